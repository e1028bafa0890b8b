"""Many named tensors as few large ones, with no more than one of these in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Some tensors, end to end in one buffer. Valid until the next bucket is asked for: that reuses the buffer."""

    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[torch.Size, ...]
    data: Tensor  # [bytes] uint8
    is_last: bool

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Views of the buffer."""
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        return [
            (name, part.view(dtype).view(shape))
            for name, dtype, shape, part in zip(
                self.names, self.dtypes, self.shapes, self.data.split(sizes), strict=True
            )
        ]


async def buckets(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> AsyncIterator[Bucket]:
    """Copies of the tensors, in runs of at most `max_bytes`; a larger tensor has a bucket of its own.

    The buffer is on the device of the first tensor. The event loop has its turn after every tensor.
    """
    buffer = torch.empty(0, dtype=torch.uint8)
    held: list[tuple[str, torch.dtype, torch.Size]] = []
    used = 0

    def full(is_last: bool) -> Bucket:
        names, dtypes, shapes = zip(*held, strict=True)
        return Bucket(names, dtypes, shapes, buffer[:used], is_last)

    for name, tensor in tensors:
        tensor = tensor.detach()
        aligned = used % tensor.dtype.itemsize == 0
        if held and (used + tensor.nbytes > max_bytes or not aligned):
            yield full(is_last=False)
            held, used = [], 0
        if used + tensor.nbytes > buffer.numel():  # the first tensor, or one larger than all before
            buffer = torch.empty(0, dtype=torch.uint8)  # frees the old one first
            buffer = torch.empty(max(max_bytes, tensor.nbytes), dtype=torch.uint8, device=tensor.device)
        buffer[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        held.append((name, tensor.dtype, tensor.shape))
        used += tensor.nbytes
        del tensor  # before the next is made
        await asyncio.sleep(0)
    if held:
        yield full(is_last=True)
