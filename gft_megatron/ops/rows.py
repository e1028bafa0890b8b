"""From logits [..., v/p] and labels [...] of a model to the rows that the operators take."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = -1
"""What the operators take as the label of an ignored row (any negative one does)."""


def check_arguments(logits: Tensor, labels: Tensor, temperature: float) -> None:
    """Raise ValueError where shapes, dtypes, devices or the temperature do not fit."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits must be float32, bfloat16 or float16, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., vocabulary / tensor-parallel size], got {tuple(logits.shape)}")
    check_labels(labels, tuple(logits.shape[:-1]), logits.device)
    check_temperature(temperature)


def check_labels(labels: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if labels.dtype != torch.int64 or labels.shape != shape or labels.device != device:
        raise ValueError(
            f"labels must be int64 {shape} on {device}, got {labels.dtype} {tuple(labels.shape)} on {labels.device}"
        )


def check_temperature(temperature: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def vocab_slice(width: int, vocab_size: int | None, tp_group: dist.ProcessGroup | None) -> tuple[int, int, int]:
    """First id of this rank's `width` columns, how many of them are no padding, and the vocabulary's true size.

    Raises:
        ValueError: the ranks do not have as many columns.
    """
    rank, size = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
    vocab = width * size if vocab_size is None else vocab_size
    if not 1 <= vocab <= width * size:
        raise ValueError(f"vocab_size must be in [1, {width * size}] ({size} shards of {width} columns), got {vocab}")
    return rank * width, min(max(vocab - rank * width, 0), width), vocab


def may_look(tensor: Tensor) -> bool:
    """Whether Python may look at values: on CUDA the host would wait, and torch.compile sees none while it traces."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def row_labels(labels: Tensor, ignore_index: int, vocab: int) -> Tensor:  # [...] -> [n]
    """Labels as the operators want them, after a look at their range."""
    ignored = labels == ignore_index
    require_in_vocabulary(labels, ignored | ((labels >= 0) & (labels < vocab)), vocab)
    return labels.masked_fill(ignored, IGNORED).reshape(-1)


def require_in_vocabulary(labels: Tensor, in_range: Tensor, vocab: int) -> None:
    if may_look(labels):
        if not in_range.all():
            raise ValueError(f"label {int(labels[~in_range][0])} is outside the vocabulary [0, {vocab})")
    else:
        torch._assert_async(in_range.all(), f"a label is outside the vocabulary [0, {vocab})")


def row_blocks(logits: Tensor) -> list[Tensor]:
    """Matrices [n_i, v/p] over the same memory that together hold every row, in order: one, unless the strides of the
    leading dimensions cannot be merged (`logits[:, :-1]`, a transposed [s, b, v/p])."""
    try:
        return [logits.view(-1, logits.shape[-1])]
    except RuntimeError:
        return [block for part in logits.unbind(0) for block in row_blocks(part)]


def shares_rows(logits: Tensor) -> bool:
    """Whether rows of adjacent logits may share memory (`expand`, `unfold`): no gradient is written over such."""
    reach = logits.shape[-1]
    for stride, size in sorted(zip(logits.stride()[:-1], logits.shape[:-1], strict=True)):
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def saved_through_hooks() -> bool:
    """Whether saved tensors pass through hooks now: activation recompute (non-reentrant), offloading.

    What the hooks hand out in the backward may be shared, and autograd does not compare its version; so nothing is
    written over the logits then.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
