"""Compatibility-Aware Dynamic Fine-Tuning (arXiv:2606.11206).

    loss_t = -w_i sg(p_t) log p_t,    w_i = exp(-beta max(0, c_hat_i)),    c_hat_i = (c_i - mu) / (sigma + 1e-6)

c_i is the mean negative log-likelihood of the token's response, mu and sigma its mean and deviation over the responses
of the global batch. A demonstration that fits the policy as well as the average one has DFT's loss; the worse it fits,
the less it weighs. Weights are constants and are not renormalised.

Written from two notes that agree; no official code is known. They leave open:

* Whether L_DFT(x, y) of a response is a sum or a mean over its tokens. Here every token counts alike, as in the code of
  DFT; 1/|B| sum_i w_i (1/|y_i|) sum_t is --loss-reduction seq-mean.
* Which deviation. Here the population's, the only one that is defined for a batch of one response.
* Whether p_t is a constant. Here it is: see dft.py.
"""

from __future__ import annotations

import math

from torch import Tensor

from gft_megatron.losses.coefficients import coefficient_shares
from gft_megatron.losses.inputs import LossInputs, LossOutput, over_batch
from gft_megatron.losses.reduce import masked_mean
from gft_megatron.losses.sequences import sequence_sums

_EPS = 1e-6  # of the paper


def compatibility(inputs: LossInputs) -> tuple[Tensor, Tensor]:  # [num_sequences] fp64 each
    """Mean negative log-likelihood of each response, 0 for one without tokens, and how many tokens it has; detached."""
    sums, counts = (values.double() for values in sequence_sums(inputs, -inputs.log_probs))
    return sums / counts.clamp(min=1), counts


def compatibility_sums(inputs: LossInputs) -> dict[str, Tensor]:
    """Of the responses that have a token: how many, and the sums of c and c^2."""
    scores, counts = compatibility(inputs)
    return {
        "sequences": (counts > 0).double().sum(),
        "score": scores.sum(),
        "score_squared": scores.square().sum(),
    }


@over_batch(compatibility_sums)
def cadft(inputs: LossInputs, *, beta: float = 1.0) -> LossOutput:
    """CADFT's per-token loss [n], 0 on masked positions. Every response counts, whatever its reward.

    Args:
        beta: how much less a response weighs for each standard deviation above the mean; 0 is DFT.

    Raises:
        ValueError: beta is out of range, or the tokens of a response are not adjacent.
    """
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta is {beta}; it has to be finite and at least 0 (0 is DFT)")
    assert inputs.batch is not None
    scores, _ = compatibility(inputs)
    num_sequences = inputs.batch["sequences"].clamp(min=1)
    mean = inputs.batch["score"] / num_sequences
    deviation = (inputs.batch["score_squared"] / num_sequences - mean.square()).clamp(min=0).sqrt()
    weight = (-beta * ((scores - mean) / (deviation + _EPS)).clamp(min=0)).exp()

    mask = inputs.mask.bool()
    log_probs = inputs.log_probs.where(mask, 0.0)
    coefficient = weight.float()[inputs.sequence_ids] * log_probs.detach().exp()
    token_weight = weight.float()[inputs.sequence_ids]
    metrics = {
        "coefficient_mean": masked_mean(coefficient, mask),
        "weight_mean": masked_mean(token_weight, mask),
        "downweighted_frac": masked_mean((token_weight < 1).float(), mask),
        **coefficient_shares(coefficient, mask),
        **coefficient_shares(token_weight, mask, "weight"),
    }
    return -(coefficient * log_probs).where(mask, 0.0), metrics
