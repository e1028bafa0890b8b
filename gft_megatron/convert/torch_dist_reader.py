"""Read a torch_dist checkpoint (Megatron's dist_checkpointing on torch.distributed.checkpoint) without Megatron.

A checkpoint lists global tensors, each cut into boxes that lie in .distcp files; any layout of ranks writes the same
global tensors. Its list is a pickle, which is read as data: nothing in a checkpoint is ever run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gft_megatron.convert.inert_pickle import Made, Name, read_inert, shown
from gft_megatron.convert.stored_tensor import StoredTensor
from gft_megatron.convert.torch_archive import tensor_in_archive
from gft_megatron.convert.weight_files import read_json, refuse_to_leave

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG_FILE = "metadata.json"
METADATA_FILE = ".metadata"

_LARGEST_METADATA = 256 * 2**20
_DTYPES = {Name("torch", str(dtype).removeprefix("torch.")): dtype for dtype in (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)}  # fmt: skip


@dataclass(frozen=True)
class Box:
    """A part of a global tensor, and where its archive lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class GlobalTensor:
    """A tensor of a checkpoint, unread."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def find_checkpoint(path: Path) -> Path:
    """The folder with the checkpoint's files: `path`, or the one that the tracker in it names.

    Raises:
        ValueError: there is none, or one of another format.
    """
    if (path / CONFIG_FILE).exists():
        return path
    tracker = path / TRACKER
    if tracker.is_file():
        with open(tracker, "rb") as file:
            text = file.read(40).decode("ascii", "replace").strip()
        if text != "release" and not text.isdigit():
            raise ValueError(f"{tracker} says {text!r}, expected 'release' or the number of an iteration")
        folder = path / (text if text == "release" else f"iter_{int(text):07d}")
        if (folder / CONFIG_FILE).exists():
            return folder
        path = folder
    if not path.is_dir():
        raise ValueError(f"{path} is no folder, expected a Megatron checkpoint")
    if any(path.glob("mp_rank_*")):
        raise ValueError(
            f"{path} holds {min(path.glob('mp_rank_*')).name}: Megatron's old format is a pickle for one parallel "
            "layout, which is never read; save it again with --ckpt-format torch_dist"
        )
    raise ValueError(f"{path} lacks {CONFIG_FILE}: expected a checkpoint of Megatron's dist_checkpointing")


@dataclass(frozen=True)
class Piece:
    """A box of a parameter, without the axes of layers and experts."""

    offsets: tuple[int, ...]
    stored: StoredTensor

    def moved_down(self, rows: int) -> Piece:
        return Piece((self.offsets[0] + rows, *self.offsets[1:]), self.stored)


@dataclass(frozen=True)
class StoredParameter:
    """One parameter of one layer (and expert): a global tensor at an index along its first axes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """A slice of rows, of columns, or of both; what lies elsewhere is not read.

        Raises:
            ValueError, OSError: a file has changed or cannot be read.
        """
        slices = index if isinstance(index, tuple) else (index,)
        missing = (slice(None),) * (len(self.shape) - len(slices))
        bounds = [part.indices(size)[:2] for part, size in zip((*slices, *missing), self.shape, strict=True)]
        chosen = torch.empty([stop - start for start, stop in bounds], dtype=self.dtype)
        for piece in self.pieces:
            boxes = [
                (max(start, at), min(stop, at + size))
                for (start, stop), at, size in zip(bounds, piece.offsets, piece.stored.shape, strict=True)
            ]
            if all(low < high for low, high in boxes):
                place, inside = (
                    tuple(slice(low - zero, high - zero) for (low, high), zero in zip(boxes, zeros, strict=True))
                    for zeros in ([start for start, _ in bounds], piece.offsets)
                )
                chosen[place] = piece.stored[inside]
        return chosen

    def read(self, memory: Tensor) -> Tensor:
        """All of it.

        Args:
            memory: at least `nbytes` of uint8, which the result is a view of: fresh pages cost as much as reading.

        Raises:
            ValueError, OSError: a file has changed or cannot be read.
        """
        whole = memory[: self.nbytes].view(self.dtype).view(self.shape)
        for piece in self.pieces:
            bounds = zip(piece.offsets, piece.stored.shape, strict=True)
            piece.stored.read_into(whole[tuple(slice(start, start + size) for start, size in bounds)])
        return whole


class TorchDistFolder:
    """A checkpoint. Its list is read at once; a tensor's files are looked at when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Open what `find_checkpoint` found.

        Raises:
            ValueError: another format or version, or a damaged list; one line, naming the file.
        """
        self.path = path
        config = read_json(path / CONFIG_FILE)
        backend, version = config.get("sharded_backend"), config.get("sharded_backend_version", 1)
        if (backend, version) != ("torch_dist", 1):
            raise ValueError(
                f"{path / CONFIG_FILE}: format {backend!r} version {version!r}, expected 'torch_dist' version 1"
            )
        self.tensors: dict[str, GlobalTensor] = {}
        self.objects: set[str] = set()
        """What is no tensor: random states, extra states of modules."""
        self._boxes: dict[tuple[str, int], dict[tuple[int, ...], list[Box]]] = {}
        self._read_list()

    def _read_list(self) -> None:
        path = self.path / METADATA_FILE
        try:
            refuse_to_leave(self.path, path)
            if path.stat().st_size > _LARGEST_METADATA:
                raise ValueError(f"{path.stat().st_size} bytes are too many for it")
            state = _state_of(read_inert(path.read_bytes()), "Metadata")
            places = self._places(state["storage_data"])
            for key, entry in state["state_dict_metadata"].items():
                if type(key) is not str:
                    raise ValueError(f"a tensor is called {shown(key)}")
                if entry.maker.name == "BytesStorageMetadata":
                    self.objects.add(key)
                else:
                    self.tensors[key] = _global_tensor(key, entry, places)
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"cannot read {path}: {what}") from error

    def _places(self, storage_data: dict[Made, Made]) -> dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]]:
        places = {}
        for index, info in storage_data.items():
            where, what = _state_of(index, "MetadataIndex"), _state_of(info, "_StorageInfo")
            name = what["relative_path"]
            if type(where["fqn"]) is not str:
                raise ValueError(f"a tensor is called {shown(where['fqn'])}")
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"tensor {where['fqn']!r} is in {shown(name)}, expected the name of a file beside it")
            if what.get("transform_descriptors"):
                raise ValueError(f"tensor {where['fqn']!r} is transformed: {_listed(what['transform_descriptors'])}")
            if where.get("offset") is not None:
                places[where["fqn"], _size(where["offset"])] = (
                    self.path / name, _number(what["offset"]), _number(what["length"]),
                )  # fmt: skip
        return places

    def parameter(self, key: str, index: tuple[int, ...]) -> StoredParameter:
        """The part of a tensor at `index` along its first axes, checked: all of it is there, in whole files.

        The caller has made sure that the tensor's shape is what it expects.

        Raises:
            ValueError: the first thing wrong; one line, naming the file and the tensor.
            KeyError: there is no tensor of this name.
        """
        tensor = self.tensors[key]
        try:
            return StoredParameter(tensor.dtype, tensor.shape[len(index) :], tuple(self._pieces(tensor, index)))
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.path}: tensor {key!r}: {error}") from error

    def _pieces(self, tensor: GlobalTensor, index: tuple[int, ...]) -> Iterator[Piece]:
        depth = len(index)
        boxes = self._boxes_at(tensor, depth).get(index, [])
        volume = sum(math.prod(box.sizes[depth:]) for box in boxes)
        overlap = any(_overlap(a, b, depth) for a, b in itertools.combinations(boxes, 2))
        if overlap or volume != math.prod(tensor.shape[depth:]):
            raise ValueError(
                f"its parts {'overlap' if overlap else 'have holes'}: {volume} of {math.prod(tensor.shape[depth:])} "
                f"elements at {list(index)}; was a rank's file lost?"
            )
        for box in boxes:
            refuse_to_leave(self.path, box.path)
            if not box.path.is_file():
                raise ValueError(f"{box.path} is missing")
            stored = tensor_in_archive(box.path, box.start, box.length)
            if (stored.dtype, stored.shape) != (tensor.dtype, box.sizes):
                raise ValueError(
                    f"{box.path} has {stored.dtype} {list(stored.shape)}, "
                    f"{METADATA_FILE} says {tensor.dtype} {list(box.sizes)}"
                )
            for number, offset in zip(index, box.offsets[:depth], strict=True):
                stored = stored.without_first_axis(number - offset)
            yield Piece(box.offsets[depth:], stored)

    def _boxes_at(self, tensor: GlobalTensor, depth: int) -> dict[tuple[int, ...], list[Box]]:
        """Index along the first `depth` axes -> boxes there."""
        if (tensor.key, depth) not in self._boxes:
            found: dict[tuple[int, ...], list[Box]] = {}
            for box in tensor.boxes:
                ranges = (range(at, at + size) for at, size in zip(box.offsets[:depth], box.sizes, strict=False))
                for index in itertools.product(*ranges):
                    found.setdefault(index, []).append(box)
            self._boxes[tensor.key, depth] = found
        return self._boxes[tensor.key, depth]


def _overlap(a: Box, b: Box, depth: int) -> bool:
    sides = zip(a.offsets[depth:], a.sizes[depth:], b.offsets[depth:], b.sizes[depth:], strict=True)
    return all(start < other + length and other < start + size for start, size, other, length in sides)


def _global_tensor(
    key: str, entry: Made, places: dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]]
) -> GlobalTensor:
    state = _state_of(entry, "TensorStorageMetadata")
    name = _state_of(state["properties"], "TensorProperties")[0]
    dtype = _DTYPES.get(name) if isinstance(name, Name) else None
    if dtype is None:
        raise ValueError(f"tensor {key!r} has a dtype that we do not know")
    shape = _size(state["size"])
    boxes = []
    for chunk in state["chunks"]:
        where = _state_of(chunk, "ChunkStorageMetadata")
        offsets, sizes = _size(where["offsets"]), _size(where["sizes"])
        if not len(shape) == len(offsets) == len(sizes) or any(
            at + size > full for at, size, full in zip(offsets, sizes, shape, strict=True)
        ):
            raise ValueError(f"tensor {key!r} of shape {list(shape)} has a part at {offsets} of {sizes}")
        if (key, offsets) not in places:
            raise ValueError(f"tensor {key!r}: no file holds its part at {list(offsets)}")
        boxes.append(Box(offsets, sizes, *places[key, offsets]))
    return GlobalTensor(key, dtype, shape, tuple(boxes))


def _listed(values: Any) -> str:
    return ", ".join(map(shown, values[:8])) if isinstance(values, list) else shown(values)


def _state_of(made: Any, class_name: str) -> Any:
    if not isinstance(made, Made) or not isinstance(made.maker, Name) or made.maker.name != class_name:
        raise ValueError(f"expected a {class_name}, found {shown(getattr(made, 'maker', made))}")
    return made.state


def _size(made: Made) -> tuple[int, ...]:
    """A torch.Size."""
    if made.maker != Name("torch", "Size"):
        raise ValueError(f"expected a torch.Size, found {shown(made.maker)}")
    return tuple(_number(number) for number in made.arguments[0])


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"expected a size or a place in a file, found {shown(value)}")
    return value
