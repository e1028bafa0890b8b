"""Proximal Supervised Fine-Tuning (arXiv:2508.17784; formula as in the authors' code).

    loss_t = -min(r_t, clip(r_t, 1 - clip_low, 1 + clip_high)) = -min(r_t, 1 + clip_high),    r_t = p_t / p_old,t

PPO's surrogate with the demonstration in place of the sample and an advantage of 1. The lower clip never acts, as the
minimum takes the ratio there, so it is no parameter. In the first step after p_old is taken r is 1 and the gradient is
that of cross-entropy: PSFT differs from SFT only with several steps for each rollout (the authors have 8,
--num-steps-per-rollout or --num-epochs-per-rollout).

Only expert and teacher responses carry gradient: with an advantage of 1, wrong own samples would be learnt too. Own
samples still count in the token mean, so give this loss --n-self 0.
"""

from __future__ import annotations

import math

from gft_megatron.losses.importance import log_ratios, recorded_tokens
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires, token_local
from gft_megatron.losses.reduce import masked_mean


@token_local
@requires("old_log_probs")
def psft(inputs: LossInputs, *, clip_high: float = 0.28) -> LossOutput:
    """PSFT's clipped ratio [n], 0 on masked positions and on own samples. Its value starts at -1, not at the NLL.

    Args:
        clip_high: ratios above 1 + clip_high are clipped.
    """
    if not 0 <= clip_high < math.inf:
        raise ValueError(f"clip_high is {clip_high}; it has to be finite and at least 0")
    recorded = recorded_tokens(inputs)
    log_ratio = log_ratios(inputs, recorded)
    # Clipped before exp: an overflowing ratio would have the gradient 0 * inf.
    highest = math.log1p(clip_high)
    ratio = log_ratio.clamp(max=highest).exp()
    clipped = log_ratio.detach() > highest
    metrics = {
        "coefficient_mean": masked_mean(ratio.where(recorded & ~clipped, 0.0), inputs.mask),
        "clipped_frac": masked_mean(clipped.float(), inputs.mask),
    }
    return -ratio.where(recorded, 0.0), metrics
