"""Proximal Policy Optimization's clip (arXiv:1707.06347 Eq. 7) with the dual clip (arXiv:1912.09729), no critic.

    s_t    = min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A),    r_t = p_t / p_old,t
    loss_t = -s_t for A >= 0,    -max(s_t, dual_clip A) for A < 0

For A < 0 the first line has no bound: a token that became much more likely than it was when drawn is pushed back with
all of its ratio. The dual clip leaves such a token out. A is the group's advantage, not one of a value function.
"""

from __future__ import annotations

from gft_megatron.losses.importance import clipped_token_loss
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires, token_local, trains_on


@trains_on("own")
@token_local
@requires("advantages", "old_log_probs")
def ppo(
    inputs: LossInputs,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    tis_clip: float | None = None,
) -> LossOutput:
    """PPO's clipped surrogate [n], 0 on masked positions and on recorded responses.

    Args:
        clip_low: ratios below 1 - clip_low are clipped.
        clip_high: ratios above 1 + clip_high are clipped.
        dual_clip: ratios above this are clipped where the advantage is negative; inf is GRPO's loss.
        tis_clip: weigh each token by min(p_old / p_rollout, tis_clip); 2 is usual. Default: no weight.

    Raises:
        ValueError: a hyper-parameter is out of range, or tis_clip is set without rollout_log_probs.
    """
    return clipped_token_loss(inputs, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, tis_clip=tis_clip)
