"""A tensor that lies in one piece somewhere in a file, read a slice at a time.

Plain reads into memory that the caller frees, no mapping: mapped pages of a large file would pile up in the process.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_BYTES_AT_ONCE = 64 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """Elements in row-major order, little-endian, from byte `offset` of `path`. Threads may share one."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def row_range(self, start: int, stop: int) -> StoredTensor:
        """Rows [start, stop) of the first axis, unread."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, offset=self.offset + start * row, shape=(stop - start, *self.shape[1:]))

    def without_first_axis(self, index: int) -> StoredTensor:
        """The `index`-th row, unread and without that axis."""
        row = self.row_range(index, index + 1)
        return replace(row, shape=row.shape[1:])

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """A slice of rows, of columns, or of both, as a tensor of its own.

        Raises:
            ValueError: the file ends before the tensor does.
            OSError: it cannot be read.
        """
        slices = index if isinstance(index, tuple) else (index,)
        bounds = [part.indices(size) for part, size in zip(slices, self.shape, strict=False)]
        assert len(slices) <= max(len(self.shape), 1) and all(step == 1 for *_, step in bounds)
        if not bounds:
            return self._read()
        rows = self.row_range(bounds[0][0], max(bounds[0][:2]))
        if all(bound[:2] == (0, size) for bound, size in zip(bounds[1:], self.shape[1:], strict=False)):
            return rows._read()
        shape = [stop - start for start, stop, _ in bounds]
        chosen = torch.empty((*shape, *self.shape[len(bounds) :]), dtype=self.dtype)
        rows_at_once = max(1, _BYTES_AT_ONCE * rows.shape[0] // max(rows.nbytes, 1))
        for start in range(0, rows.shape[0], rows_at_once):
            stop = min(start + rows_at_once, rows.shape[0])
            chosen[start:stop] = rows.row_range(start, stop)._read()[:, *slices[1:]]
        return chosen

    def read_into(self, target: Tensor) -> None:
        """Fill a tensor of this shape, of any strides and dtype.

        Raises:
            ValueError, OSError: as `[...]`.
        """
        assert target.shape == self.shape
        if target.is_contiguous() and target.dtype is self.dtype:
            self._read(target)
        else:
            target.copy_(self[:])

    def _read(self, target: Tensor | None = None) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype) if target is None else target
        wanted: Any = memoryview(tensor.flatten().view(torch.uint8).numpy())
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(wanted):
                count = os.preadv(descriptor, [wanted[done : done + _BYTES_AT_ONCE]], self.offset + done)
                if count == 0:
                    raise ValueError(f"{self.path} has no byte {self.offset + done}; was it changed meanwhile?")
                done += count
        finally:
            os.close(descriptor)
        return tensor
