"""Group Relative Policy Optimization (arXiv:2402.03300), without its KL term.

    loss_t = -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A),    r_t = p_t / p_old,t

Only the model's own samples carry gradient: r_t of a response that p_old did not draw is no importance ratio. Tokens of
recorded responses still count in the token mean, so give this loss --n-expert 0 --n-teacher 0.
"""

from __future__ import annotations

import torch

from gft_megatron.groups import Source
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires, token_local
from gft_megatron.losses.reduce import masked_mean


@token_local
@requires("advantages", "old_log_probs")
def grpo(inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.2) -> LossOutput:
    """GRPO's clipped surrogate [n], 0 on masked positions and on recorded responses.

    Args:
        clip_low: ratios below 1 - clip_low are clipped.
        clip_high: ratios above 1 + clip_high are clipped.
    """
    assert inputs.advantages is not None and inputs.old_log_probs is not None
    mask = inputs.mask.bool()
    own = mask & (inputs.sources == int(Source.SELF))[inputs.sequence_ids]  # int: torch.compile knows no enum here
    log_ratio = (inputs.log_probs - inputs.old_log_probs.detach()).where(own, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    advantage = inputs.advantages[inputs.sequence_ids]
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    metrics = {
        "coefficient_mean": masked_mean(ratio.detach().where(own, 0.0), mask),
        "clipped_frac": masked_mean(((clipped * advantage < ratio * advantage) & own).float(), mask),
    }
    return loss.where(own, 0.0), metrics
