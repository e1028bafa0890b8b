"""Unified Fine-Tuning, UFT (arXiv:2505.16984; formula as in the authors' code).

    L = GRPO's token mean over drawn tokens + hint_coef * mean of -log p_t over hint tokens

A prompt is followed by a hint, the beginning of a solution, and the model draws the rest: the rest is reinforced, the
hint is imitated. A hint token is one of an own sample without rollout_log_probs. Each mean has its own number of
tokens, over the global batch:

    loss_t = N / N_drawn * GRPO's loss_t     drawn tokens
    loss_t = -hint_coef N / N_hint log p_t   hint tokens

How long hints are is the matter of rollout/hints.py. The paper's settings, after which the model answers alone:

    --phases uft:300:hint_segments=5:schedule=hint_share=0.95:0.05:cosine,uft:200 --n-self 4

The authors also have a KL term: --kl-coef. Without hints the loss is GRPO's. Groups with equal rewards, which GRPO
leaves out, are kept while there are hints to learn from. Prompts without an expert's response get no hint.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gft_megatron.losses.importance import clipped_surrogate, log_ratios, own_tokens, sampler_weight
from gft_megatron.losses.inputs import (
    LossInputs,
    LossOutput,
    of_token_mean,
    over_batch,
    requires,
    token_local,
    trains_on,
)
from gft_megatron.losses.reduce import masked_mean
from gft_megatron.losses.sequences import count_tokens


def hint_tokens(inputs: LossInputs) -> Tensor:  # [n] bool
    """Unmasked tokens of own samples that the sampler did not draw."""
    assert inputs.rollout_log_probs is not None
    return own_tokens(inputs) & inputs.rollout_log_probs.isnan()


def part_sums(inputs: LossInputs) -> dict[str, Tensor]:
    """All tokens, drawn ones and those of hints."""
    hint = hint_tokens(inputs)
    return {
        "tokens": count_tokens(inputs, inputs.mask.bool()),
        "drawn_tokens": count_tokens(inputs, own_tokens(inputs) & ~hint),
        "hint_tokens": count_tokens(inputs, hint),
    }


@of_token_mean
@trains_on("own")
@token_local
@requires("advantages", "old_log_probs", "rollout_log_probs")
@over_batch(part_sums, of_policy=False)
def uft(
    inputs: LossInputs,
    *,
    hint_coef: float = 0.001,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    tis_clip: float | None = None,
) -> LossOutput:
    """UFT's per-token loss [n], 0 on masked positions and on recorded responses.

    Args:
        hint_coef: weight of the hints' cross-entropy.
        clip_low: ratios below 1 - clip_low are clipped.
        clip_high: ratios above 1 + clip_high are clipped.
        tis_clip: weigh each token by min(p_old / p_rollout, tis_clip); 2 is usual. Default: no weight.

    Raises:
        ValueError: a hyper-parameter is out of range.
    """
    if not 0 <= hint_coef < math.inf:
        raise ValueError(f"hint_coef is {hint_coef}; it has to be finite and at least 0")
    assert inputs.old_log_probs is not None and inputs.batch is not None
    hint = hint_tokens(inputs)
    drawn = own_tokens(inputs) & ~hint
    weight, weight_metrics = sampler_weight(inputs, inputs.old_log_probs, drawn, tis_clip)
    ratio = log_ratios(inputs, drawn).exp()
    surrogate, metrics = clipped_surrogate(inputs, ratio, drawn, clip_low=clip_low, clip_high=clip_high)
    sizes = torch.stack([inputs.batch["drawn_tokens"], inputs.batch["hint_tokens"]])
    drawn_scale, hint_scale = (inputs.batch["tokens"] / sizes.clamp(min=1)).float().unbind()
    nll = -inputs.log_probs.where(hint, 0.0)
    loss = drawn_scale * weight * surrogate + hint_coef * hint_scale * nll
    metrics |= {"hint_frac": masked_mean(hint.float(), inputs.mask), "hint_nll": masked_mean(nll, inputs.mask)}
    return loss, metrics | weight_metrics
