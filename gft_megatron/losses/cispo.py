"""Clipped Importance Sampling Policy Optimization (arXiv:2506.13585 Eq. 4 and 5).

    loss_t = -A * c_t * log p_t,    c_t = clip(r_t, 1 - clip_low, 1 + clip_high),    r_t = p_t / p_old,t

c_t is a constant. GRPO's clip takes the gradient from a token outside the range; here the token keeps one, of bounded
weight. The mean over all tokens is the paper's own.
"""

from __future__ import annotations

from gft_megatron.losses.importance import log_ratios, own_tokens, ratio_tails, require_clips, sampler_weight
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires, token_local, trains_on
from gft_megatron.losses.reduce import masked_mean


@trains_on("own")
@token_local
@requires("advantages", "old_log_probs")
def cispo(
    inputs: LossInputs, *, clip_low: float = 1.0, clip_high: float = 0.28, tis_clip: float | None = None
) -> LossOutput:
    """CISPO's per-token loss [n], 0 on masked positions and on recorded responses.

    Args:
        clip_low: ratios below 1 - clip_low are clipped. From 1 on none is: the paper has no lower bound.
        clip_high: ratios above 1 + clip_high are clipped. The paper tunes it and gives no value; 0.28 is DAPO's.
        tis_clip: weigh each token by min(p_old / p_rollout, tis_clip); 2 is usual. Default: no weight.

    Raises:
        ValueError: a hyper-parameter is out of range, or tis_clip is set without rollout_log_probs.
    """
    assert inputs.advantages is not None and inputs.old_log_probs is not None
    require_clips(clip_low, clip_high)
    own = own_tokens(inputs)
    weight, weight_metrics = sampler_weight(inputs, inputs.old_log_probs, own, tis_clip)
    ratio = log_ratios(inputs, own).detach().exp()
    coefficient = ratio.clamp(1.0 - clip_low, 1.0 + clip_high).where(own, 0.0)
    loss = -weight * inputs.advantages[inputs.sequence_ids] * coefficient * inputs.log_probs.where(own, 0.0)
    metrics = {
        "coefficient_mean": masked_mean(coefficient, inputs.mask),
        "clipped_frac": masked_mean(((coefficient != ratio) & own).float(), inputs.mask),
        **ratio_tails(inputs, ratio, own),
    }
    return loss, metrics | weight_metrics
