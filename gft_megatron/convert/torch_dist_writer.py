"""Write a torch_dist checkpoint, as Megatron's dist_checkpointing does, without Megatron and without a process group.

torch's own FileSystemWriter keeps every tensor of a file until the file is whole, and loses what goes wrong in its
threads; so only the list at the end is left to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from gft_megatron.convert.complete_folder import naming_the_disk, write_json
from gft_megatron.convert.torch_dist_reader import CONFIG_FILE

LARGEST_FILE = 5_000_000_000


@dataclass(frozen=True)
class Part:
    """A box of a global tensor, made when its turn comes."""

    key: str
    shape: tuple[int, ...]
    """Of the global tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """Contiguous, of `sizes` but for leading ones, of `dtype`."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


def write_torch_dist(
    folder: Path,
    parts: Sequence[Part],
    *,
    empty_objects: Sequence[str],
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Write the parts, a file and more for each worker; a worker holds one part at a time.

    Args:
        folder: exists and is empty.
        empty_objects: keys of objects that are None.
        progress: called with the bytes of each part that is written, by any worker.

    Raises:
        ValueError, OSError: what went wrong first.
    """
    stop = threading.Event()

    def work(number: int, own: Sequence[Part]) -> list[WriteResult]:
        try:
            return _write_files(folder, number, own, stop, progress)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(work, number, own) for number, own in enumerate(divide(parts, workers))]
        try:
            written = [future.result() for future in running]
        except BaseException:  # an interrupt too
            stop.set()
            raise
    with naming_the_disk(folder):
        written.append(_write_nothing(folder / f"__{workers}_0.distcp", empty_objects))
        listed = {**_tensors(parts), **{key: BytesStorageMetadata() for key in empty_objects}}
        _ListWriter(folder, sync_files=False).finish(Metadata(listed), written)
        # Version 3 is how query, key and value have been laid out since 2021; without it Megatron-LM would move them.
        common = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {"singleton_local_shards": False}}
        torch.save(common, folder / "common.pt")
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        write_json(folder / CONFIG_FILE, {**config, "common_backend": "torch", "common_backend_version": 1})


def divide(parts: Sequence[Part], workers: int) -> list[list[Part]]:
    """The parts of each worker, about as many bytes each, in the given order."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for index in sorted(range(len(parts)), key=lambda index: -parts[index].nbytes):
        lightest = loads.index(min(loads))
        shares[lightest].append(index)
        loads[lightest] += parts[index].nbytes
    return [[parts[index] for index in sorted(share)] for share in shares]


def _write_files(
    folder: Path, worker: int, parts: Sequence[Part], stop: threading.Event, progress: Callable[[int], None]
) -> list[WriteResult]:
    results: list[WriteResult] = []
    remaining = list(reversed(parts))
    while remaining:
        path = folder / f"__{worker}_{_number_of_files(results)}.distcp"
        with naming_the_disk(path):
            file = open(path, "wb")  # noqa: SIM115 (closed below)
        with file:
            while remaining and (file.tell() == 0 or file.tell() + remaining[-1].nbytes <= LARGEST_FILE):
                if stop.is_set():
                    return results
                part = remaining.pop()
                results.append(_write_part(path, file, part))
                progress(part.nbytes)
    return results


def _number_of_files(results: Sequence[WriteResult]) -> int:
    return len({result.storage_data.relative_path for result in results})


def _write_part(path: Path, file: BinaryIO, part: Part) -> WriteResult:
    tensor = part.make().view(part.sizes)
    assert tensor.dtype is part.dtype and tensor.untyped_storage().nbytes() == tensor.nbytes, part
    start = file.tell()
    with naming_the_disk(path):
        try:
            torch.save(tensor, file)
            file.flush()
        except RuntimeError as error:  # what torch's writer makes of a full disk
            raise OSError(str(error).splitlines()[0]) from error
    length = file.tell() - start
    return WriteResult(MetadataIndex(part.key, part.offsets), length, _StorageInfo(path.name, start, length))


def _write_nothing(path: Path, keys: Sequence[str]) -> list[WriteResult]:
    """None, once for all keys, in the list that dist_checkpointing makes of an object's shards."""
    with open(path, "wb") as file:
        torch.save([None], file)
        length = file.tell()
    return [WriteResult(MetadataIndex(key), length, _StorageInfo(path.name, 0, length)) for key in keys]


def _tensors(parts: Sequence[Part]) -> dict[str, TensorStorageMetadata]:
    tensors: dict[str, TensorStorageMetadata] = {}
    for part in parts:
        properties = TensorProperties(dtype=part.dtype)
        entry = tensors.setdefault(part.key, TensorStorageMetadata(properties, torch.Size(part.shape), []))
        assert (entry.properties.dtype, tuple(entry.size)) == (part.dtype, part.shape), part
        entry.chunks.append(ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)))
    return tensors


class _ListWriter(FileSystemWriter):
    def storage_meta(self) -> None:
        """Otherwise the path of this machine would stand in the checkpoint."""
