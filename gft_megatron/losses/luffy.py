"""LUFFY: off-policy responses in the group, with policy shaping (arXiv:2504.14945; formula as in the authors' code).

    loss_t = -A * p_t / (p_t + shaping)    on expert and teacher responses: weight shaping p_t / (p_t + shaping)^2
    loss_t = -A * p_t / p_old,t            on own samples; the authors' script has no clip

The gradient goes through the shaping. Its weight is largest at p = shaping, so unlikely tokens count for more than
under -A * p, whose weight is p.

The authors divide by a fixed length and do not divide advantages by the standard deviation; here the reduction is the
token mean of every loss, and the second is --advantage-normalization none. Their group has one recorded response among
eight.
"""

from __future__ import annotations

import math

from gft_megatron.losses.importance import log_ratios, recorded_tokens
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires, token_local, trains_on
from gft_megatron.losses.reduce import masked_mean


@trains_on("mixed")
@token_local
@requires("advantages", "old_log_probs")
def luffy(inputs: LossInputs, *, shaping: float = 0.1) -> LossOutput:
    """LUFFY's per-token loss [n], 0 on masked positions.

    Args:
        shaping: probability at which a token of a recorded response weighs most.
    """
    if not 0 < shaping < math.inf:
        raise ValueError(f"shaping is {shaping}; it has to be finite and above 0")
    assert inputs.advantages is not None
    mask = inputs.mask.bool()
    recorded = recorded_tokens(inputs)
    # This is p / (p + shaping), but keeps the digits of its gradient where p is much larger than shaping.
    shaped = (inputs.log_probs.where(recorded, 0.0) - math.log(shaping)).sigmoid()
    ratio = log_ratios(inputs, mask & ~recorded).exp()
    loss = -inputs.advantages[inputs.sequence_ids] * shaped.where(recorded, ratio)
    weight = (shaped * (1.0 - shaped)).where(recorded, ratio)
    return loss.where(mask, 0.0), {"coefficient_mean": masked_mean(weight, mask)}
