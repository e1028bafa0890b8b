"""Write a Hugging Face model folder that is either absent or complete, whenever the process dies.

Which tensor goes where into which file is settled beforehand, from the configuration. Each is written to its place when
it comes, in any order, from any thread: nothing is held.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from gft_megatron.convert.complete_folder import CompleteFolder, naming_the_disk, write_json
from gft_megatron.convert.families.tables import dtype_kept
from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.mapping import expected_hf_shapes
from gft_megatron.convert.stored_tensor import StoredTensor
from gft_megatron.convert.weight_files import DTYPES, INDEX_FILE, SINGLE_FILE, read_json, refuse_to_leave

CARRIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "NOTICE",
    "USE_POLICY.md",
)
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_ALIGNMENT = 8
_BYTES_AT_ONCE = 64 * 2**20


@dataclass(frozen=True)
class HfPlan:
    """What a folder's weight files will be."""

    tensors: dict[str, StoredTensor]
    """Place of each, in a path relative to the folder."""
    headers: dict[Path, bytes]
    """Of each file."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan_files(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], max_shard_bytes: int
) -> HfPlan:
    """Fill files with whole tensors, layer after layer, up to `max_shard_bytes` or one tensor each."""
    files: list[list[str]] = [[]]
    filled = 0
    for name in sorted(shapes, key=_layer_of):
        size = torch.Size(shapes[name]).numel() * dtypes[name].itemsize
        if files[-1] and filled + size > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    tensors: dict[str, StoredTensor] = {}
    headers = {}
    safetensors_name = {dtype: name for name, dtype in DTYPES.items()}
    for number, names in enumerate(files, 1):
        path = Path(SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors")
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        in_file: dict[str, StoredTensor] = {}
        end = 0
        for name in sorted(names, key=lambda name: -dtypes[name].itemsize):  # so that each is aligned
            in_file[name] = tensor = StoredTensor(path, end, dtypes[name], tuple(shapes[name]))
            end += tensor.nbytes
            place = {
                "dtype": safetensors_name[tensor.dtype],
                "shape": tensor.shape,
                "data_offsets": [tensor.offset, end],
            }
            header[name] = place
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        headers[path] = len(text).to_bytes(8, "little") + text
        start = len(headers[path])
        tensors |= {
            name: StoredTensor(path, start + tensor.offset, tensor.dtype, tensor.shape)
            for name, tensor in in_file.items()
        }
    return HfPlan(tensors, headers)


def _layer_of(name: str) -> float:
    number = _LAYER_NUMBER.search(name)
    return int(number.group()) if number else float("-inf" if "embed" in name else "inf")


def check_carried_files(source: Path) -> None:
    """Refuse to carry what is not in the folder.

    Raises:
        ValueError: a file is a symbolic link out of `source`.
    """
    for name in ("config.json", *CARRIED_FILES):
        refuse_to_leave(source, source / name)


def copy_everything_but_weights(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """config.json, tokenizer, generation configuration, chat template and licence; never code.

    Args:
        dtype: what config.json will say; None: what it says now.

    Raises:
        ValueError: as `check_carried_files`.
    """
    check_carried_files(source)
    config = read_json(source / "config.json")
    if dtype is not None:
        for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}:  # transformers 5 and 4 have it so
            config[key] = str(dtype).removeprefix("torch.")
    write_json(target / "config.json", config)
    for name in CARRIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_hf_folder(
    path: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source_folder: str | Path,
    dtype: torch.dtype,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the model as safetensors with the configuration and tokenizer of `source_folder`.

    Args:
        path: absent, empty, or a folder that this function wrote and nobody added to; that one is replaced.
        tensors: (Hugging Face name, tensor) of the whole model, on any device; written before the next is asked for.
        source_folder: the model folder that the training started from.
        dtype: what the weights are stored in.

    Raises:
        ValueError: `path` holds something else; or the tensors are not exactly those of the model in `source_folder`.
        OSError: the disk failed or is full; the message names the path and the free bytes. Nothing is left behind then.
            `tensors` is left where it stood: a caller whose iterable is a collective has to finish it.
    """
    with HfFolderWriter(path, source_folder=source_folder, dtype=dtype, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
        writer.publish()


class HfFolderWriter:
    """The same, tensor by tensor: for a caller that has other work between two of them, or several threads.

    Without `publish`, leaving the `with` block leaves nothing behind.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        source_folder: str | Path,
        dtype: torch.dtype | Mapping[str, torch.dtype],
        max_shard_bytes: int,
        flag: str = "--hf-export",
    ) -> None:
        """As `write_hf_folder`.

        Args:
            dtype: one for all tensors but those that are kept in float32, or one for each.
            flag: what the user gave `path` by.
        """
        self._folder = CompleteFolder(Path(path), flag=flag)
        self._partial = self._folder.partial
        self._missing: set[str] = set()
        try:
            with naming_the_disk(self._folder.target):
                one_dtype = dtype if isinstance(dtype, torch.dtype) else None
                copy_everything_but_weights(Path(source_folder), self._partial, one_dtype)
                shapes = expected_hf_shapes(HfFolder(self._partial).shape)
                dtypes = {name: dtype_kept(name, one_dtype) for name in shapes} if one_dtype is not None else dtype
                self._plan = plan_files(shapes, dtypes, max_shard_bytes)
                for file, header in self._plan.headers.items():
                    (self._partial / file).write_bytes(header)
        except BaseException:
            self._folder.discard()
            raise
        self._missing.update(self._plan.tensors)

    def __enter__(self) -> HfFolderWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.discard()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the tensor to its place.

        Raises:
            ValueError: the model in `source_folder` has no such tensor.
            OSError: as `write_hf_folder`.
        """
        place = self._plan.tensors.get(name)
        if place is None:
            raise ValueError(f"the model in {self._folder.target} has no tensor {name!r}")
        assert name in self._missing, f"{name} was given twice"
        assert tensor.shape == place.shape, f"{name} has shape {tuple(tensor.shape)}, expected {place.shape}"
        host = tensor.detach().to("cpu", place.dtype).contiguous()
        with naming_the_disk(self._partial):
            _write_at(self._partial / place.path, place.offset, host)
        self._missing.remove(name)

    def publish(self) -> None:
        """Check that it is the whole model, flush, and rename.

        Raises:
            ValueError, OSError: as `write_hf_folder`.
        """
        if self._missing:
            raise ValueError(f"{self._folder.target}: no file holds tensor {min(self._missing)!r}")
        if len(self._plan.headers) > 1:
            weight_map = {name: str(tensor.path) for name, tensor in self._plan.tensors.items()}
            index = {"metadata": {"total_size": self._plan.num_bytes}, "weight_map": weight_map}
            with naming_the_disk(self._partial):
                write_json(self._partial / INDEX_FILE, index)
        HfFolder(self._partial).check_weights()
        self._folder.publish()


def _write_at(path: Path, offset: int, tensor: Tensor) -> None:
    content = memoryview(tensor.flatten().view(torch.uint8).numpy())
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < len(content):
            done += os.pwrite(descriptor, content[done : done + _BYTES_AT_ONCE], offset + done)
    finally:
        os.close(descriptor)
