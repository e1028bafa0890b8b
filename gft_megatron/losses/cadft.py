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
from collections.abc import Mapping

import torch
from torch import Tensor

from gft_megatron.losses.coefficients import coefficient_shares
from gft_megatron.losses.inputs import LossInputs, LossOutput, over_batch, tells_responses
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
    return _sums_of(scores, counts > 0)


def _sums_of(scores: Tensor, counted: Tensor) -> dict[str, Tensor]:  # [n] fp64, [n] bool
    return {
        "sequences": counted.double().sum(),
        "score": scores.sum(),
        "score_squared": scores.square().sum(),
    }


def _weights_of(scores: Tensor, batch: Mapping[str, Tensor], beta: float) -> Tensor:  # [n] fp64 -> [n] fp64
    """w of responses with these c, among a batch with these sums."""
    num_sequences = batch["sequences"].clamp(min=1)
    mean = batch["score"] / num_sequences
    deviation = (batch["score_squared"] / num_sequences - mean.square()).clamp(min=0).sqrt()
    return (-beta * ((scores - mean) / (deviation + _EPS)).clamp(min=0)).exp()


def weight_quantiles(
    sample_nll: Tensor,  # [n] fp64
    batch: Mapping[str, Tensor] | None,
    *,
    beta: float = 1.0,
) -> dict[str, float]:
    """The 10, 50 and 90 % quantiles of the weights of all responses, as the loss had them."""
    if batch is None:
        batch = _sums_of(sample_nll, torch.ones_like(sample_nll, dtype=torch.bool))
    weights = _weights_of(sample_nll, {name: value.to(sample_nll.device) for name, value in batch.items()}, beta)
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=weights.dtype, device=weights.device)
    return dict(zip(("weight_q10", "weight_q50", "weight_q90"), weights.quantile(levels).tolist(), strict=True))


@tells_responses(weight_quantiles)
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
    weight = _weights_of(scores, inputs.batch, beta)

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
