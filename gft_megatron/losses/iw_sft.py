"""Importance-weighted SFT (arXiv:2507.12856; formula as in the authors' code).

    loss_t = -w_i log p_t,    w_i = min(exp(weight_scale * mean over t of log(p_t / p_ref,t)), weight_max)

A demonstration weighs by how much likelier it has become than it was to the reference model, as a response (the
geometric mean of its tokens' ratios); w_i is a constant. In the first step, with the reference for a policy, this is
cross-entropy. The variant of the code that weighs each token clips the token's own ratio to [0.2, 1.8]: token_clip 0.8.
"""

from __future__ import annotations

import math

from gft_megatron.losses.coefficients import coefficient_shares
from gft_megatron.losses.inputs import LossInputs, LossOutput, requires
from gft_megatron.losses.reduce import masked_mean
from gft_megatron.losses.sequences import sequence_means


@requires("ref_log_probs")
def iw_sft(
    inputs: LossInputs,
    *,
    weight_scale: float = 1.0,
    weight_max: float = 16.0,
    token_clip: float | None = None,
) -> LossOutput:
    """iw-SFT's per-token loss [n], 0 on masked positions. Every response counts, whatever its reward.

    Args:
        weight_scale: exponent of the ratio; 0 is cross-entropy.
        weight_max: largest weight of a response.
        token_clip: weigh each token by its own ratio, clipped to 1 - token_clip and 1 + token_clip; the authors have
            0.8. Default: one weight a response.

    Raises:
        ValueError: a hyper-parameter is out of range, or the tokens of a response are not adjacent.
    """
    if not 0 <= weight_scale < math.inf:
        raise ValueError(f"weight_scale is {weight_scale}; it has to be finite and at least 0 (0 is cross-entropy)")
    if not 0 < weight_max < math.inf:
        raise ValueError(f"weight_max is {weight_max}; it has to be finite and above 0")
    if token_clip is not None and not 0 <= token_clip < math.inf:
        raise ValueError(f"token_clip is {token_clip}; it has to be finite and at least 0")
    assert inputs.ref_log_probs is not None
    mask = inputs.mask.bool()
    log_probs = inputs.log_probs.where(mask, 0.0)
    log_ratio = log_probs.detach() - inputs.ref_log_probs.where(mask, 0.0)
    if token_clip is None:
        weight = (weight_scale * sequence_means(inputs, log_ratio)[inputs.sequence_ids]).exp()
        capped = weight.clamp(max=weight_max)
    else:
        weight = (weight_scale * log_ratio).exp()
        capped = weight.clamp(1.0 - token_clip, 1.0 + token_clip)
    metrics = {
        "coefficient_mean": masked_mean(capped, mask),
        "clipped_frac": masked_mean((capped != weight).float(), mask),
        **coefficient_shares(capped, mask),
    }
    return -(capped * log_probs).where(mask, 0.0), metrics
