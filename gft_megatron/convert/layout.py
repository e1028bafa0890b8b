"""Cut whole Hugging Face tensors into one rank's shard of a Megatron parameter, and put all shards together again.

Pure functions of tensors, exact inverses of each other, bit for bit. No files, no process groups.

Legend: r rows of a part, w columns (missing for a bias), p tensor-parallel size, g key-value heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gft_megatron.convert.families import Layout


class Sliceable(Protocol):
    """A tensor, or something that reads a slice of one (safetensors' PySafeSlice)."""

    def __getitem__(self, index: Any) -> Tensor: ...


@dataclass(frozen=True)
class TensorSpec:
    """One Megatron parameter of one model."""

    layout: Layout
    part_shapes: tuple[tuple[int, ...], ...]
    """Shapes of the Hugging Face tensors it is made of."""
    num_query_groups: int
    """Runs of rows [queries, key, value] in a QKV parameter; other layouts do not read it."""
    is_expert: bool = False
    """The tensor-parallel ranks that share it are the expert-tensor-parallel ones."""

    @property
    def is_sharded(self) -> bool:
        """False: all tensor-parallel ranks hold the same values."""
        return self.layout is not Layout.REPLICATED


def shard(parts: Sequence[Sliceable], spec: TensorSpec, tp_rank: int, tp_size: int, padded_rows: int = 0) -> Tensor:
    """One rank's shard: [r/p, w], or [r, w/p] of a ROW layout.

    Only the rank's own slices of `parts` are read, and they are cut before they are interleaved, so that a lazy part
    costs one shard of memory. The result may be a view of a part.

    Args:
        parts: the whole Hugging Face tensors, in the order of `spec.part_shapes`.
        tp_size: divides the parameter, see `ModelShape.check_tensor_parallel_size`.
        padded_rows: VOCAB only: rows over all ranks, a multiple of `tp_size`.
    """
    assert len(parts) == len(spec.part_shapes)
    if spec.layout is Layout.REPLICATED:
        return parts[0][:]
    if spec.layout is Layout.ROW:
        return parts[0][:, _share(spec.part_shapes[0][1], tp_rank, tp_size)]
    if spec.layout is Layout.VOCAB:
        return _padded_share(parts[0], spec.part_shapes[0][0], tp_rank, tp_size, padded_rows)
    own = [part[_share(shape[0], tp_rank, tp_size)] for part, shape in zip(parts, spec.part_shapes, strict=True)]
    if len(own) == 1:
        return own[0]
    runs = _runs_per_rank(spec, tp_size)
    return torch.cat([rows.unflatten(0, (runs, -1)) for rows in own], dim=1).flatten(0, 1)


def shard_of_whole(whole: Sliceable, spec: TensorSpec, tp_rank: int, tp_size: int, padded_rows: int = 0) -> Tensor:
    """The same of the whole Megatron parameter, `shard(parts, spec, 0, 1)`, as a torch_dist checkpoint has it.

    Args:
        whole: of a VOCAB layout with any padding, which is not read.
    """
    if spec.layout is Layout.REPLICATED:
        return whole[:]
    if spec.layout is Layout.ROW:
        return whole[:, _share(spec.part_shapes[0][1], tp_rank, tp_size)]
    if spec.layout is Layout.VOCAB:
        return _padded_share(whole, spec.part_shapes[0][0], tp_rank, tp_size, padded_rows)
    if spec.layout is Layout.GATED:
        rows = spec.part_shapes[0][0]
        own = _share(rows, tp_rank, tp_size)
        starts = range(0, rows * len(spec.part_shapes), rows)
        return torch.cat([whole[slice(start + own.start, start + own.stop)] for start in starts])
    return whole[_share(sum(shape[0] for shape in spec.part_shapes), tp_rank, tp_size)]


def merge(shards: Sequence[Tensor], spec: TensorSpec) -> Iterator[Tensor]:
    """The whole Hugging Face tensors, contiguous, in the order of `spec.part_shapes`; may be views of the shards.

    Each is made when it is asked for.

    Args:
        shards: of all tensor-parallel ranks, in order; of a REPLICATED parameter one is enough. Padding is cut off.
    """
    if spec.layout is Layout.REPLICATED:
        yield shards[0]
    elif spec.layout is Layout.ROW:
        yield _cat(shards, dim=1)
    elif spec.layout is Layout.VOCAB:
        yield _cat(shards, dim=0)[: spec.part_shapes[0][0]]
    else:
        runs = _runs_per_rank(spec, len(shards))
        rows_in_run = [shape[0] // (len(shards) * runs) for shape in spec.part_shapes]
        # [ranks][parts] of [runs, rows in a run, w]
        pieces = [whole.unflatten(0, (runs, -1)).split(rows_in_run, dim=1) for whole in shards]
        for pieces_of_part in zip(*pieces, strict=True):
            yield _cat([piece.flatten(0, 1) for piece in pieces_of_part], dim=0)


def _runs_per_rank(spec: TensorSpec, tp_size: int) -> int:
    """Times that the parts take turns in one rank's rows.

    Once for each key-value head (megatron/core/transformer/attention.py, SelfAttention.get_query_key_value_tensors);
    once in all for gate and up (megatron/core/transformer/mlp.py, glu in MLP.forward).
    """
    if spec.layout is not Layout.QKV:
        return 1
    assert spec.num_query_groups % tp_size == 0
    return spec.num_query_groups // tp_size


def _share(size: int, tp_rank: int, tp_size: int) -> slice:
    assert size % tp_size == 0
    return slice(size // tp_size * tp_rank, size // tp_size * (tp_rank + 1))


def _padded_share(part: Sliceable, num_rows: int, tp_rank: int, tp_size: int, padded_rows: int) -> Tensor:
    assert padded_rows >= num_rows
    wanted = _share(padded_rows, tp_rank, tp_size)
    own = part[min(wanted.start, num_rows) : min(wanted.stop, num_rows)]
    missing = wanted.stop - wanted.start - own.shape[0]
    return torch.cat([own, own.new_zeros(missing, *own.shape[1:])]) if missing else own


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(list(tensors), dim)
