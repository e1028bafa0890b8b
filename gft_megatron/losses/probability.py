"""The probability family of Beyond Log-Likelihood (arXiv:2510.00526; written from its README's formulas).

    loss_t = (1 - p_t^a) / a    where q_min <= p_t <= q_max, else 0;    d loss_t / d log p_t = -p_t^a

a -> 0 is cross-entropy (SFT), a = 1 is 1 - p with exactly DFT's gradient, a = 10 is a tenth of the paper's -p^10. Their
thresholded objectives: OnlyTopP-q is q_min = q, OnlyBottomP-q is q_max = q, both with a = 1; the LogP ones have a = 0.
The larger a, the less unlikely tokens count: good where the base model is strong, bad where it is weak.

Their code divides a thresholded loss by the number of kept tokens; here, as everywhere, the token mean is over all
response tokens. The metric `kept_frac` is the factor between the two.
"""

from __future__ import annotations

import math

import torch

from gft_megatron.losses.coefficients import coefficient_shares
from gft_megatron.losses.inputs import LossInputs, LossOutput, token_local
from gft_megatron.losses.reduce import masked_mean


@token_local
def probability(
    inputs: LossInputs, *, prob_power: float = 1.0, prob_min: float = 0.0, prob_max: float = 1.0
) -> LossOutput:
    """(1 - p^a) / a per token [n], 0 on masked positions and outside the thresholds. Every response counts.

    Args:
        prob_power: a. 0 is the limit a -> 0, cross-entropy.
        prob_min: tokens less likely than this have no loss.
        prob_max: tokens more likely than this have no loss.
    """
    if not 0 <= prob_power < math.inf:
        raise ValueError(f"prob_power is {prob_power}; it has to be finite and at least 0 (0 is cross-entropy)")
    if not 0 <= prob_min <= prob_max <= 1:
        raise ValueError(f"prob_min is {prob_min} and prob_max {prob_max}; 0 <= prob_min <= prob_max <= 1 has to hold")
    mask = inputs.mask.bool()
    log_probs = inputs.log_probs.where(mask, 0.0)
    constant = log_probs.detach()
    probs = constant.exp()
    # A probability that rounding put above 1 is 1: it would be lost to the default prob_max.
    kept = mask & (probs >= prob_min) & (probs.clamp(max=1.0) <= prob_max)
    coefficient = (prob_power * constant).exp()
    value = -torch.expm1(prob_power * constant) / prob_power if prob_power > 0 else -constant
    # expm1's own gradient is its result + 1, which rounds to 0 for unlikely tokens. The bracket is 0.
    loss = value - coefficient * (log_probs - constant)
    metrics = {
        "coefficient_mean": masked_mean(coefficient.where(kept, 0.0), mask),
        "kept_frac": masked_mean(kept.float(), mask),
        **coefficient_shares(coefficient, mask, chosen=kept),
    }
    return loss.where(kept, 0.0), metrics
