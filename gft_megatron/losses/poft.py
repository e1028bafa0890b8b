"""Preference-oriented supervised fine-tuning, PoFT (arXiv:2412.12865; formula as in the authors' code).

    L_i = -log sigmoid(beta m_i - beta m_ref,i + gamma),    m_i = mean over t of log p_t

A Bradley-Terry model of two models on the same answer: the policy should find it likelier than an aligned model does,
which is the reference here (--ref-hf-checkpoint); the authors average m_ref over several. The gradient is that of the
mean cross-entropy times beta sigmoid(beta (m_ref - m) - gamma): a response that the policy already finds likelier than
the aligned model counts less, and so do bad responses, which the aligned model finds unlikely.

As in gspo.py, each token has the loss of its response and its own part of the gradient. The paper averages over
responses; with the token mean of this project a response weighs by its length.
"""

from __future__ import annotations

import math

from torch.nn.functional import logsigmoid

from gft_megatron.losses.coefficients import coefficient_shares
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires
from gft_megatron.losses.reduce import masked_mean
from gft_megatron.losses.sequences import sequence_means


@requires("ref_log_probs")
def poft(inputs: LossInputs, *, beta: float = 1.0, gamma: float = 0.0) -> LossOutput:
    """PoFT's loss of its response at each token [n], 0 on masked positions. Every response counts.

    Args:
        beta: scale of the comparison.
        gamma: added to the difference; above 0 the policy may stop earlier.

    Raises:
        ValueError: a hyper-parameter is out of range, or the tokens of a response are not adjacent.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}; it has to be finite and above 0")
    if not math.isfinite(gamma):
        raise ValueError(f"gamma is {gamma}; it has to be finite")
    assert inputs.ref_log_probs is not None
    mask = inputs.mask.bool()
    log_probs = inputs.log_probs.where(mask, 0.0)
    lead = sequence_means(inputs, log_probs.detach() - inputs.ref_log_probs.where(mask, 0.0))[inputs.sequence_ids]
    # The value is that of the response, the gradient the token's own.
    margin = beta * (lead + (log_probs - log_probs.detach())) + gamma
    coefficient = beta * (-margin.detach()).sigmoid()
    metrics = {
        "coefficient_mean": masked_mean(coefficient, mask),
        "preferred_frac": masked_mean((lead > 0).float(), mask),
        **coefficient_shares(coefficient, mask),
    }
    return -logsigmoid(margin).where(mask, 0.0), metrics
