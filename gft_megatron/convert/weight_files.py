"""Find and open the safetensors files of a folder; knows nothing of models.

Only headers are read here. safetensors itself refuses a file that is longer or shorter than its header says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_weight_files(folder: Path) -> dict[str, tuple[Path, Any]]:
    """Tensor name -> (path, open safetensors file) that holds it.

    Raises:
        ValueError: no weights, pickled weights, a missing or damaged file, an index that does not fit its files.
    """
    tensors: dict[str, tuple[Path, Any]] = {}
    for path, listed_names in _files_and_their_names(folder).items():
        file = _open(path)
        names = set(file.keys())
        if listed_names is not None:
            _check_index(path, names, listed_names)
        tensors |= dict.fromkeys(names, (path, file))
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    try:
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


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({path.stat().st_size} bytes): {error}") from error


def _check_index(path: Path, names: set[str], listed_names: set[str]) -> None:
    if absent := listed_names - names:
        raise ValueError(f"{path} lacks tensor {min(absent)!r}, which {INDEX_FILE} lists in it")
    if unlisted := names - listed_names:
        raise ValueError(f"{path} holds tensor {min(unlisted)!r}, which {INDEX_FILE} does not list in it")
