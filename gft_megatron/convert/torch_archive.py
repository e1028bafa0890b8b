"""Find the tensor that torch.save wrote somewhere in a file, without loading the archive: nothing in it is run.

torch.save writes a zip archive of uncompressed members: data.pkl (the form of the tensor), data/0 (its elements) and a
few small ones. A file of a distributed checkpoint is a row of such archives.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from gft_megatron.convert.inert_pickle import Made, Name, read_inert, shown
from gft_megatron.convert.stored_tensor import StoredTensor

_STORAGES = {
    Name("torch", "FloatStorage"): torch.float32,
    Name("torch", "BFloat16Storage"): torch.bfloat16,
    Name("torch", "HalfStorage"): torch.float16,
}
_REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
_LARGEST_MEMBER = 2**20
"""Of those that we read: a few hundred bytes each."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, that hands out no more than a little at once."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._offset, self._length, self._at = offset, length, 0

    def close(self) -> None:
        self._file.close()
        super().close()

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("a place before its beginning")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        size = left if size < 0 else min(size, left)
        if size > _LARGEST_MEMBER:
            raise OSError(f"a directory or description of {size} bytes")
        content = os.pread(self._file.fileno(), size, self._offset + self._at)
        self._at += len(content)
        return content


def tensor_in_archive(path: Path, offset: int, length: int) -> StoredTensor:
    """The tensor of the archive in `length` bytes from `offset` on.

    Raises:
        ValueError: that is no archive of torch.save, or one of something else than a plain floating-point tensor.
    """
    try:
        if offset < 0 or length < 0 or offset + length > path.stat().st_size:
            raise ValueError(f"the file has {path.stat().st_size} bytes")
        with _Window(path, offset, length) as window, zipfile.ZipFile(window) as archive:
            return _find_tensor(path, offset, window, archive)
    except (
        ValueError, OSError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, struct.error,
        zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{path}: bytes {offset} to {offset + length} are no whole tensor of torch.save: {error}"
        ) from error


def _find_tensor(path: Path, offset: int, window: _Window, archive: zipfile.ZipFile) -> StoredTensor:
    (description,) = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    folder = description.filename.removesuffix("data.pkl")
    dtype, key, shape = _form(read_inert(_small_member(archive, folder + "data.pkl")))
    if _small_member(archive, folder + "byteorder", default=b"little") != b"little":
        raise ValueError("elements in big-endian order")
    elements = archive.getinfo(f"{folder}data/{key}")
    if elements.compress_type != zipfile.ZIP_STORED or elements.file_size != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{elements.file_size} bytes of elements for {dtype} {list(shape)}")
    window.seek(elements.header_offset)
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(window.read(_LOCAL_HEADER.size))
    start = elements.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if magic != b"PK\3\4" or start + elements.file_size > window.seek(0, os.SEEK_END):
        raise ValueError("a member that is not where the directory says")
    return StoredTensor(path, offset + start, dtype, shape)


def _small_member(archive: zipfile.ZipFile, name: str, default: bytes | None = None) -> bytes:
    if default is not None and name not in archive.NameToInfo:
        return default
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > _LARGEST_MEMBER:
        raise ValueError(f"member {name!r} is compressed or has {info.file_size} bytes")
    return archive.read(info)


def _form(pickled: Any) -> tuple[torch.dtype, str, tuple[int, ...]]:
    """Dtype, name of the member with the elements, shape."""
    if not isinstance(pickled, Made) or pickled.maker != _REBUILD:
        raise ValueError(f"made by {shown(pickled.maker if isinstance(pickled, Made) else pickled)}")
    storage, first, shape, strides, *_ = pickled.arguments
    kind, storage_type, key, _, num_elements = storage.arguments
    if kind != "storage" or not isinstance(storage_type, Name) or storage_type not in _STORAGES:
        raise ValueError(f"a storage of {shown(storage_type)}, expected float32, bfloat16 or float16")
    are_tuples = isinstance(shape, tuple) and isinstance(strides, tuple)
    if (
        type(key) is not str
        or not are_tuples
        or not all(type(number) is int for number in (*shape, *strides, num_elements))
    ):
        raise ValueError("a shape that is no numbers")
    contiguous = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    same = all(size == 1 or a == b for size, a, b in zip(shape, strides, contiguous, strict=True))
    if first != 0 or not same or num_elements != math.prod(shape):
        raise ValueError(f"a view with strides {strides} of {num_elements} elements, expected a whole tensor")
    return _STORAGES[storage_type], key, tuple(shape)
