"""Find and open the safetensors files of a folder; knows nothing of models.

Only headers are read here. safetensors itself refuses a file that is longer or shorter than its header says, and
tensors that overlap or leave holes.
"""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gft_megatron.convert.stored_tensor import StoredTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What we convert, by safetensors' names."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LARGEST_HEADER = 32 * 2**20
"""A quarter of a million tensors in one file. What somebody makes up may take many times its size to parse."""


def open_weight_files(folder: Path) -> dict[str, StoredTensor]:
    """Tensor name -> where it lies.

    Raises:
        ValueError: no weights, pickled weights, a missing or damaged file, an index that does not fit its files, a
            tensor that is not floating point.
    """
    tensors: dict[str, StoredTensor] = {}
    for path, listed_names in _files_and_their_names(folder).items():
        refuse_to_leave(folder, path)
        in_file = tensors_in(path)
        if listed_names is not None:
            _check_index(path, in_file.keys(), listed_names)
        tensors |= in_file
    return tensors


def refuse_to_leave(folder: Path, path: Path) -> None:
    """Refuse a symbolic link out of the folder, but for those of a Hugging Face cache (snapshots/REVISION -> blobs).

    Raises:
        ValueError: names the link.
    """
    if not path.is_symlink():
        return
    target, home = path.resolve(), folder.resolve()
    if home not in target.parents and target.parent != home.parent.parent / "blobs":
        raise ValueError(f"{path} is a symbolic link to {target}, out of the folder; put the file itself there")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    try:
        if path.stat().st_size > _LARGEST_HEADER:
            raise ValueError(f"{path.stat().st_size} bytes are too many for it")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _files_and_their_names(folder: Path) -> dict[Path, set[str] | None]:
    """Weight files, each with the names that the index lists for it; None where there is no index."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists() and index.exists():
        raise ValueError(f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is out of date")
    if single.exists():
        return {single: None}
    if index.exists():
        return _read_index(index)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder / pickles[0]}: pickled weights are never read, they can run code; "
            f"save the model again with save_pretrained, which writes {SINGLE_FILE}"
        )
    raise ValueError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_index(index: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected a 'weight_map' of tensor names to file names")
    files: dict[Path, set[str] | None] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise ValueError(
                f"{index}: tensor {name!r} is in {file_name!r}, expected the name of a file beside the index"
            )
        if not (index.parent / file_name).is_file():
            raise ValueError(f"{index.parent / file_name} is missing; {INDEX_FILE} lists tensor {name!r} in it")
        files.setdefault(index.parent / file_name, set()).add(name)
    return files


def tensors_in(path: Path) -> dict[str, StoredTensor]:
    """Tensor name -> where it lies, of one file.

    Raises:
        ValueError: as `open_weight_files`.
    """
    header = _checked_header(path)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: tensor {name!r} has dtype {entry['dtype']}, expected one of {list(DTYPES)}")
        tensors[name] = (DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"][0])
    start = 8 + _header_length(path)
    return {name: StoredTensor(path, start + at, dtype, shape) for name, (dtype, shape, at) in tensors.items()}


def _checked_header(path: Path) -> dict[str, Any]:
    """The header of a file that safetensors itself has found to be whole."""
    size = path.stat().st_size
    try:
        if not path.is_file():
            raise OSError("not a regular file")
        length = _header_length(path)
        if length > min(size, _LARGEST_HEADER):
            raise OSError(f"its header has {length} bytes")
        with safe_open(path, framework="pt"), open(path, "rb") as file:
            file.seek(8)
            return json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({size} bytes): {error}") from error


def _header_length(path: Path) -> int:
    with open(path, "rb") as file:
        return int.from_bytes(file.read(8), "little")


def _check_index(path: Path, names: Set[str], listed_names: set[str]) -> None:
    if absent := listed_names - names:
        raise ValueError(f"{path} lacks tensor {min(absent)!r}, which {INDEX_FILE} lists in it")
    if unlisted := names - listed_names:
        raise ValueError(f"{path} holds tensor {min(unlisted)!r}, which {INDEX_FILE} does not list in it")
