"""Entropy-Adaptive Fine-Tuning (arXiv:2601.02151, "Resolving Confident Conflicts to Mitigate Forgetting").

    loss_t = -w_t * log p_t,    w_t = (min(H_t, scale) / scale)^power    (w_t is a constant)

A token that the model is sure about (small H) and yet finds unlikely contradicts what it knows; its weight is small.

Read from the public implementation and a note on the paper. In both the weight is H_20 / 3, with H_20 the entropy of
the 20 likeliest tokens (renormalised in the code): at most ln 20 = 2.996, so that weights end at 1. That is eaft_top20,
which takes another all-gather and reads logits. `eaft` has the entropy of the whole vocabulary in nats, which the loop
has anyway, and the minimum keeps the bound. H_20 is never above H, so no weight is smaller in `eaft`; a model without
doubt gives 0 in both.
"""

from __future__ import annotations

import math

from torch import Tensor

from gft_megatron.losses.inputs import LossInputs, LossOutput, requires, token_local
from gft_megatron.losses.reduce import masked_mean

TOP_K = 20
"""Of the paper."""


@token_local
@requires("entropy")
def eaft(inputs: LossInputs, *, entropy_power: float = 1.0, entropy_scale: float = 3.0) -> LossOutput:
    """Cross-entropy weighted by the entropy [n], 0 on masked positions. Every response counts, whatever its reward.

    Args:
        entropy_power: exponent of the weight; 0 is cross-entropy.
        entropy_scale: entropy in nats from which on the weight is 1.

    Raises:
        ValueError: a hyper-parameter is out of range.
    """
    assert inputs.entropy is not None
    return _weighted(inputs, inputs.entropy, entropy_power, entropy_scale)


@token_local
@requires("top_entropy")
def eaft_top20(inputs: LossInputs, *, entropy_power: float = 1.0, entropy_scale: float = 3.0) -> LossOutput:
    """As `eaft`, by the entropy of the 20 likeliest tokens."""
    assert inputs.top_entropy is not None
    return _weighted(inputs, inputs.top_entropy, entropy_power, entropy_scale)


def _weighted(inputs: LossInputs, entropy: Tensor, power: float, scale: float) -> LossOutput:  # [n]
    if not 0 <= power < math.inf:
        raise ValueError(f"entropy_power is {power}; it has to be finite and at least 0 (0 is cross-entropy)")
    if not 0 < scale < math.inf:
        raise ValueError(f"entropy_scale is {scale} nats; it has to be finite and above 0")
    mask = inputs.mask.bool()
    coefficient = (entropy.detach().where(mask, 0.0).clamp(0.0, scale) / scale) ** power
    loss = -coefficient * inputs.log_probs.where(mask, 0.0)
    return loss.where(mask, 0.0), {"coefficient_mean": masked_mean(coefficient, mask)}
