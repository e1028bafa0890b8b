"""Write a Hugging Face model folder that is either absent or complete, whenever the process dies.

Everything goes into a sibling folder `.NAME.partial`, is flushed to disk, checked, and renamed to NAME at the end.
Weights are written a file at a time: no more than `max_shard_bytes` of them are held. One writer a folder at a time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gft_megatron.convert.families.tables import KEPT_IN_FLOAT32
from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.weight_files import INDEX_FILE, SINGLE_FILE, read_json
from gft_megatron.durable import sync

_MARKER_FILE = "gft_megatron_export.json"
_COPIED_FILES = (
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
        tensors: (Hugging Face name, tensor) of the whole model, on any device; copied before the next is asked for.
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
    """The same, tensor by tensor: for a caller that has other work between two of them.

    Without `publish`, leaving the `with` block leaves nothing behind.
    """

    def __init__(
        self, path: str | Path, *, source_folder: str | Path, dtype: torch.dtype, max_shard_bytes: int
    ) -> None:
        self._target = Path(path).resolve()
        refuse_to_replace_what_is_not_ours(self._target)
        self._partial = self._target.with_name(f".{self._target.name}.partial")
        self._dtype = dtype
        self._max_shard_bytes = max_shard_bytes
        self._held: dict[str, Tensor] = {}  # host copies
        self._held_bytes = self._written_bytes = 0
        self._seen: set[str] = set()
        self._shards: list[list[str]] = []  # names in each file so far
        try:
            with _naming_the_disk(self._target):
                shutil.rmtree(self._partial, ignore_errors=True)  # left by a process that was killed
                self._partial.mkdir(parents=True)
                _copy_everything_but_weights(Path(source_folder), self._partial, dtype)
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> HfFolderWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        self._held = {}
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Copy the tensor, and write a file when enough of them are held.

        Raises:
            OSError: as `write_hf_folder`.
        """
        assert name not in self._seen, f"{name} was given twice"
        self._seen.add(name)
        size = tensor.numel() * self._dtype.itemsize
        if self._held and self._held_bytes + size > self._max_shard_bytes:
            self._write_shard()
        # A copy even where nothing changes: the tensor may be a live weight, or a view that shares its memory.
        dtype = torch.float32 if name.endswith(KEPT_IN_FLOAT32) else self._dtype
        self._held[name] = tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        self._held_bytes += size

    def publish(self) -> None:
        """Write the rest, check that it is the whole model, flush, and rename.

        Raises:
            ValueError, OSError: as `write_hf_folder`.
        """
        self._write_shard()
        self._name_files()
        HfFolder(self._partial).check_weights()
        with _naming_the_disk(self._target):
            _publish(self._partial, self._target)

    def _write_shard(self) -> None:
        file = self._partial / f"{len(self._shards)}.safetensors"
        with _naming_the_disk(self._partial):
            save_file(self._held, file, metadata={"format": "pt"})
            # safetensors 0.8 makes files that only their owner can read
            shutil.copymode(self._partial / "config.json", file)
        self._shards.append(list(self._held))
        self._written_bytes += self._held_bytes
        self._held, self._held_bytes = {}, 0

    def _name_files(self) -> None:
        if len(self._shards) == 1:
            os.rename(self._partial / "0.safetensors", self._partial / SINGLE_FILE)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file_name = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            os.rename(self._partial / f"{number}.safetensors", self._partial / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": self._written_bytes}, "weight_map": weight_map}
        with _naming_the_disk(self._partial):
            _write_json(self._partial / INDEX_FILE, index)


def refuse_to_replace_what_is_not_ours(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"--hf-export {target} is a file, expected a folder or nothing")
    found = {entry.name for entry in target.iterdir()}
    written = set(read_json(target / _MARKER_FILE).get("files", ())) if _MARKER_FILE in found else set()
    if foreign := found - written:
        raise ValueError(
            f"--hf-export {target} holds {min(foreign)!r}, which no earlier export wrote; "
            "choose another folder or empty it"
        )


def _copy_everything_but_weights(source: Path, partial: Path, dtype: torch.dtype) -> None:
    config = read_json(source / "config.json")
    for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}:  # transformers 5 and 4 have it so
        config[key] = str(dtype).removeprefix("torch.")
    _write_json(partial / "config.json", config)
    for name in _COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / name)


def _publish(partial: Path, target: Path) -> None:
    """Flush and rename. A kill between the two renames leaves no `target`, never half of one."""
    names = sorted(path.name for path in partial.iterdir())
    _write_json(partial / _MARKER_FILE, {"files": [*names, _MARKER_FILE]})
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    previous = target.with_name(f".{target.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if target.exists():
        os.rename(target, previous)
    os.rename(partial, target)
    sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def _naming_the_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        folder = next(parent for parent in path.parents if parent.exists())
        raise OSError(f"cannot write {path}: {error}; {shutil.disk_usage(folder).free} bytes are free there") from error


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
