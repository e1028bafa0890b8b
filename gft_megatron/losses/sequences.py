"""Sums and means over whole responses, for losses that weigh a response by what all of its tokens say.

The tokens of a response may lie on several context-parallel ranks, so what they add up to is a number without a
gradient: a loss puts it in front of each token's own, differentiable, term.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gft_megatron.losses.inputs import LossInputs
from gft_megatron.ops import segment_sums


def sequence_sums(inputs: LossInputs, values: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum of the values of each sequence and how many they are, [num_sequences] fp32 each, detached.

    Args:
        values: [n] fp32. What lies outside `chosen` reaches nothing, not even as NaN.
        chosen: [n] bool, the tokens that count; default: all unmasked ones.
    """
    chosen = inputs.mask.bool() if chosen is None else chosen
    # Padding belongs to sequence 0 wherever it lies, but segment ids must not decrease: it joins the one before.
    before = inputs.sequence_ids.where(chosen, 0).cummax(0).values
    segment_ids = inputs.sequence_ids.where(chosen, before)
    sums, counts = segment_sums(values.detach().float(), segment_ids, len(inputs.sources), mask=chosen)
    if inputs.context_sum is None:
        return sums, counts
    whole = inputs.context_sum(torch.stack([sums, counts]).double())
    return whole[0].float(), whole[1].float()


def sequence_means(inputs: LossInputs, values: Tensor, chosen: Tensor | None = None) -> Tensor:
    """As `sequence_sums`: the mean of each sequence, 0 where no token counts. [num_sequences] fp32, detached."""
    sums, counts = sequence_sums(inputs, values, chosen)
    return sums / counts.clamp(min=1)


def count_tokens(inputs: LossInputs, chosen: Tensor) -> Tensor:  # [n] bool -> [] fp64
    """How many tokens these are, over the whole sequences."""
    count = chosen.double().sum()
    return count if inputs.context_sum is None else inputs.context_sum(count)
