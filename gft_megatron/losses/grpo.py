"""Group Relative Policy Optimization (arXiv:2402.03300 Eq. 3), without its KL term.

    loss_t = -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A),    r_t = p_t / p_old,t

The paper averages over the tokens of a response and then over responses; here every token counts alike, as in DAPO.

DAPO (arXiv:2503.14476) is this formula with clip_high 0.28 and the token mean; its dynamic sampling is
--refill-groups. Dr. GRPO's advantage (arXiv:2503.20783) is --advantage-normalization none.
"""

from __future__ import annotations

from gft_megatron.losses.importance import clipped_token_loss
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires, token_local, trains_on


@trains_on("own")
@token_local
@requires("advantages", "old_log_probs")
def grpo(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.2, tis_clip: float | None = None
) -> LossOutput:
    """GRPO's clipped surrogate [n], 0 on masked positions and on recorded responses.

    Args:
        clip_low: ratios below 1 - clip_low are clipped.
        clip_high: ratios above 1 + clip_high are clipped.
        tis_clip: weigh each token by min(p_old / p_rollout, tis_clip); 2 is usual. Default: no weight.

    Raises:
        ValueError: a hyper-parameter is out of range, or tis_clip is set without rollout_log_probs.
    """
    return clipped_token_loss(inputs, clip_low=clip_low, clip_high=clip_high, tis_clip=tis_clip)
