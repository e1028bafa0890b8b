"""Read a Hugging Face model folder: config.json and safetensors, nothing that can run code.

Weights are memory-mapped and read one slice at a time. The headers of all files are checked against the family's table
when the first weight is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from gft_megatron.convert.families import family_of
from gft_megatron.convert.layout import shard
from gft_megatron.convert.mapping import expected_hf_shapes, hf_names_of, tensor_spec
from gft_megatron.convert.model_shape import ModelShape
from gft_megatron.convert.weight_files import open_weight_files, read_json

_FLOATS = ("F32", "BF16", "F16")
_ROWS_COMPARED_AT_ONCE = 8192


class HfFolder:
    """A model folder. `config` and `shape` are read at once; the weights need not be there until one is asked for."""

    def __init__(self, path: str | Path) -> None:
        """Open the folder.

        Raises:
            ValueError: no usable config.json, or a model that we cannot convert; one line, naming the file.
        """
        self.path = Path(path)
        self.config = _read_config(self.path / "config.json")
        try:
            self.shape = ModelShape.from_hf(self.config)
        except ValueError as error:
            raise ValueError(f"{self.path / 'config.json'}: {error}") from error

    def check_weights(self) -> None:
        """Check the header of every weight file: whole, with the names and shapes of this model, floating point.

        Raises:
            ValueError: the first thing wrong; one line, naming the file and the tensor.
        """
        _ = self._files

    def load_shard(self, name: str, *, tp_rank: int, tp_size: int, padded_vocab_size: int) -> Tensor:
        """One rank's shard of the Megatron parameter `name` (layer counted over the whole model), in the stored dtype.

        Args:
            tp_rank, tp_size: of the expert-tensor-parallel ranks where the parameter is an expert's.

        Raises:
            ValueError: as `check_weights`; a name without a table entry; a tensor-parallel size that does not divide.
        """
        spec = tensor_spec(self.shape, name)
        if spec.is_expert:
            self.shape.check_expert_tensor_parallel_size(tp_size)
        else:
            self.shape.check_tensor_parallel_size(tp_size)
        parts = [self._files[hf_name].get_slice(hf_name) for hf_name in hf_names_of(self.shape, name)]
        return shard(parts, spec, tp_rank, tp_size, padded_vocab_size)

    def tensor(self, hf_name: str) -> Tensor:
        """One whole tensor under its Hugging Face name, in the stored dtype.

        Raises:
            ValueError: as `check_weights`.
        """
        return self._files[hf_name].get_tensor(hf_name)

    @cached_property
    def _files(self) -> Mapping[str, Any]:
        """Tensor name -> the open file that holds it, for exactly the tensors of this model."""
        expected = expected_hf_shapes(self.shape)
        found = open_weight_files(self.path)
        for name, (path, file) in sorted(found.items()):
            if name in expected:
                _check_tensor(path, name, file.get_slice(name), expected[name])
            elif name == "lm_head.weight":
                _check_tied_copy(path, file.get_slice(name), found)
            elif not name.endswith(".rotary_emb.inv_freq"):  # a constant that old transformers saved with the weights
                raise ValueError(f"{path} holds tensor {name!r}, which a {self.shape.model_type} model does not have")
        for name in expected:
            if name not in found:
                raise ValueError(f"{self.path}: no file holds tensor {name!r}")
        return {name: found[name][1] for name in expected}


def _read_config(path: Path) -> PreTrainedConfig:
    """The configuration, by transformers' own class for a family that we know; never by code from the folder."""
    raw = read_json(path)
    try:
        family_of(raw.get("model_type"), raw.get("architectures"))
        return AutoConfig.from_pretrained(path.parent, trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, StrictDataclassError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _check_tensor(path: Path, name: str, tensor: Any, expected_shape: tuple[int, ...]) -> None:
    if tuple(tensor.get_shape()) != expected_shape:
        raise ValueError(
            f"{path}: tensor {name!r} has shape {tensor.get_shape()}, config.json makes it {list(expected_shape)}"
        )
    if tensor.get_dtype() not in _FLOATS:
        raise ValueError(f"{path}: tensor {name!r} has dtype {tensor.get_dtype()}, expected one of {list(_FLOATS)}")


def _check_tied_copy(path: Path, copy: Any, found: Mapping[str, tuple[Path, Any]]) -> None:
    """Accept an output layer beside tied embeddings only if it equals them, so that nothing is dropped."""
    name = "model.embed_tokens.weight"
    embedding = found[name][1].get_slice(name) if name in found else None
    same = embedding is not None and copy.get_shape() == embedding.get_shape()
    rows = copy.get_shape()[0] if same else 0
    for start in range(0, rows, _ROWS_COMPARED_AT_ONCE):
        same = same and torch.equal(
            copy[start : start + _ROWS_COMPARED_AT_ONCE], embedding[start : start + _ROWS_COMPARED_AT_ONCE]
        )
    if not same:
        raise ValueError(f"{path}: config.json ties the embeddings, but 'lm_head.weight' differs from {name!r}")
