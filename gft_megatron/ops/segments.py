"""Sums over the tokens of each sequence of a packed micro-batch, differentiable.

They serve losses that weight or average a sequence as a whole: mean negative log-likelihood, mean log-ratio.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from gft_megatron.ops.library import row_ops
from gft_megatron.ops.rows import may_look


def segment_sums(
    values: Tensor,  # [n] fp32
    segment_ids: Tensor,  # [n] int64, not decreasing
    num_segments: int,
    *,
    mask: Tensor | None = None,  # [n] bool, or 1 and 0
) -> tuple[Tensor, Tensor]:  # [num_segments] fp32, [num_segments] fp32
    """The sum of the unmasked values of each segment, and how many they are; 0 and 0 for an empty segment.

    Differentiable in `values`. Masked values reach nothing, not even as NaN. Summed in float64, in the same order on
    every run.

    Raises:
        ValueError: wrong shapes or dtypes. On CPU also ids that decrease or lie outside [0, num_segments); on CUDA,
            where looking would make the host wait, these stop the process by a device-side assertion; under
            torch.compile they are a RuntimeError on CPU.
        RuntimeError: CUDA values without the CUDA operators.
    """
    if values.dim() != 1 or values.dtype != torch.float32:
        raise ValueError(f"values must be [n] float32, got {tuple(values.shape)} {values.dtype}")
    if segment_ids.shape != values.shape or segment_ids.dtype != torch.int64 or segment_ids.device != values.device:
        raise ValueError(
            f"segment_ids must be int64 {tuple(values.shape)} on {values.device}, "
            f"got {segment_ids.dtype} {tuple(segment_ids.shape)} on {segment_ids.device}"
        )
    if mask is not None and (mask.shape != values.shape or mask.device != values.device):
        raise ValueError(
            f"mask must be {tuple(values.shape)} on {values.device}, got {tuple(mask.shape)} on {mask.device}"
        )
    if num_segments < 0:
        raise ValueError(f"num_segments must not be negative, got {num_segments}")
    _check_ids(segment_ids, num_segments)
    live = None if mask is None else mask.bool()
    return row_ops(values.device).segment_sums(values, live, segment_ids, num_segments)


def segment_means(
    values: Tensor,  # [n] fp32
    segment_ids: Tensor,  # [n] int64, not decreasing
    num_segments: int,
    *,
    mask: Tensor | None = None,  # [n] bool, or 1 and 0
) -> Tensor:  # [num_segments] fp32
    """The mean of the unmasked values of each segment, 0 for an empty one; otherwise as `segment_sums`."""
    sums, counts = segment_sums(values, segment_ids, num_segments, mask=mask)
    return sums / counts.clamp(min=1)


def _check_ids(segment_ids: Tensor, num_segments: int) -> None:
    inside = (segment_ids >= 0) & (segment_ids < num_segments)
    ordered = segment_ids[1:] >= segment_ids[:-1]
    if not may_look(segment_ids):
        torch._assert_async(inside.all(), f"a segment id is outside [0, {num_segments})")
        torch._assert_async(ordered.all(), "segment ids decrease: the values of a segment must be adjacent")
    elif not inside.all():
        raise ValueError(f"segment id {int(segment_ids[~inside][0])} is outside [0, {num_segments})")
    elif not ordered.all():
        first = int(ordered.logical_not().nonzero()[0])
        raise ValueError(
            f"segment ids must not decrease, got {int(segment_ids[first + 1])} after {int(segment_ids[first])}: "
            "sort the values by segment first"
        )


def _save_for_backward(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, mask, segment_ids, _ = inputs
    ctx.save_for_backward(mask, segment_ids)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: FunctionCtx, grad_sums: Tensor, _: Tensor) -> tuple:
    mask, segment_ids = ctx.saved_tensors
    grad = grad_sums[segment_ids]
    return grad if mask is None else grad.where(mask, 0.0), None, None, None


torch.library.register_autograd("gft_megatron::segment_sums", _backward, setup_context=_save_for_backward)
