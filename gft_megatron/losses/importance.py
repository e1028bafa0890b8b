"""Whose tokens they are, and importance ratios: which tokens have one, how it is clipped, and the weight that makes up
for a sampler whose probabilities are not the trainer's.

To the losses of group RL, tokens of recorded responses have no ratio, because no policy of ours drew them: such a loss
is 0 there. They still count in the token mean, so give these losses --n-expert 0 --n-teacher 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gft_megatron.groups import Source
from gft_megatron.losses.inputs import LossInputs, LossOutput
from gft_megatron.losses.reduce import masked_mean


def own_tokens(inputs: LossInputs) -> Tensor:  # [n] bool
    """Unmasked tokens of the model's own samples."""
    # int: torch.compile knows no enum here
    return inputs.mask.bool() & (inputs.sources == int(Source.SELF))[inputs.sequence_ids]


def recorded_tokens(inputs: LossInputs) -> Tensor:  # [n] bool
    """Unmasked tokens of expert and teacher responses."""
    return inputs.mask.bool() & ~own_tokens(inputs)


def log_ratios(inputs: LossInputs, chosen: Tensor) -> Tensor:  # [n] bool -> [n]
    """log(p_t / p_old,t) of the chosen tokens, 0 elsewhere. Differentiable in `inputs.log_probs`."""
    assert inputs.old_log_probs is not None
    return (inputs.log_probs - inputs.old_log_probs.detach()).where(chosen, 0.0)


def clipped_token_loss(
    inputs: LossInputs, *, clip_low: float, clip_high: float, dual_clip: float = math.inf, tis_clip: float | None
) -> LossOutput:
    """`clipped_surrogate` of each token's own ratio, weighted by `sampler_weight`; raises as both."""
    assert inputs.old_log_probs is not None
    own = own_tokens(inputs)
    weight, weight_metrics = sampler_weight(inputs, inputs.old_log_probs, own, tis_clip)
    ratio = log_ratios(inputs, own).exp()
    loss, metrics = clipped_surrogate(inputs, ratio, own, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return weight * loss, metrics | weight_metrics


def clipped_surrogate(
    inputs: LossInputs,
    ratio: Tensor,  # [n]
    own: Tensor,  # [n] bool
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = math.inf,
) -> LossOutput:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), for A < 0 at most -dual_clip A; [n], 0 where not own.

    Raises:
        ValueError: a clip is out of range.
    """
    assert inputs.advantages is not None
    require_clips(clip_low, clip_high)
    if not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it has to be above 1")
    advantage = inputs.advantages[inputs.sequence_ids]
    # The minimum takes the clip of one side only: the upper one for A > 0, the lower one for A < 0.
    clipped = torch.where(advantage < 0, ratio.clamp(1.0 - clip_low, dual_clip), ratio.clamp(max=1.0 + clip_high))
    is_clipped = (clipped != ratio) & (advantage != 0) & own
    metrics = {
        "coefficient_mean": masked_mean(ratio.detach().where(own, 0.0), inputs.mask),
        "clipped_frac": masked_mean(is_clipped.float(), inputs.mask),
        **ratio_tails(inputs, ratio, own),
    }
    return -(clipped * advantage).where(own, 0.0), metrics


def ratio_tails(inputs: LossInputs, ratio: Tensor, own: Tensor) -> dict[str, Tensor]:  # [n], [n] bool
    """How far the policy is from the one that drew the samples, 0 where not own.

    Shares of tokens with a ratio above 2 and below 1/2, and the estimate r - 1 - log r of KL(p_old || p), r each
    token's own ratio: its mean over samples of the old policy is that divergence, and no term is negative.
    """
    log_ratio = log_ratios(inputs, own).detach()
    return {
        "ratio_above_2_frac": masked_mean(((ratio > 2.0) & own).float(), inputs.mask),
        "ratio_below_half_frac": masked_mean(((ratio < 0.5) & own).float(), inputs.mask),
        "old_kl_mean": masked_mean(log_ratio.expm1() - log_ratio, inputs.mask),
    }


def require_clips(clip_low: float, clip_high: float) -> None:
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it has to be at least 0")


def sampler_weight(
    inputs: LossInputs,
    trained: Tensor,  # [n]
    own: Tensor,  # [n] bool
    tis_clip: float | None,
) -> tuple[Tensor | float, dict[str, Tensor]]:  # [n] or 1, metrics
    """Truncated importance sampling: min(p_trained / p_rollout, tis_clip), detached; 1 where not own.

    The sampler's kernels and precision are not the trainer's, so it drew the tokens from a slightly different policy.
    Source: Ionides 2008, "Truncated Importance Sampling"; for this mismatch Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training" (no paper; fengyao.notion.site/off-policy-rl).

    Args:
        trained: log-probs of the same policy as the trainer computes them.
        tis_clip: largest weight; None leaves every weight at 1.

    A token whose `rollout_log_probs` is NaN (the sampler gave none, or nobody sampled it) has weight 1.

    Raises:
        ValueError: tis_clip is out of range, or there are no rollout_log_probs.
    """
    if tis_clip is None:
        return 1.0, {}
    if not tis_clip > 0:
        raise ValueError(f"tis_clip is {tis_clip}; it has to be above 0")
    if inputs.rollout_log_probs is None:
        raise ValueError("tis_clip needs LossInputs.rollout_log_probs, which is None")
    known = own & ~inputs.rollout_log_probs.isnan()
    weight = (trained.detach() - inputs.rollout_log_probs).where(known, 0.0).exp()
    capped = weight.clamp(max=tis_clip).where(known, 1.0)
    metrics = {
        "tis_weight_mean": masked_mean(capped, inputs.mask),
        "tis_clipped_frac": masked_mean(((weight > tis_clip) & known).float(), inputs.mask),
    }
    return capped, metrics
