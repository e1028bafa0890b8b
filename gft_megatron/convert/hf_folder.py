"""Read a Hugging Face model folder: config.json and safetensors, nothing that can run code.

Weights are read one slice at a time. The headers of all files are checked against the family's table
when the first weight is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from gft_megatron.convert.families import family_of
from gft_megatron.convert.layout import shard
from gft_megatron.convert.lora import ADAPTER_CONFIG_FILE, AdaptedTensor, with_adapter
from gft_megatron.convert.mapping import expected_hf_shapes, hf_names_of, tensor_spec
from gft_megatron.convert.model_shape import ModelShape
from gft_megatron.convert.stored_tensor import StoredTensor
from gft_megatron.convert.weight_files import open_weight_files, read_json

_ROWS_COMPARED_AT_ONCE = 8192
_MOST = {"num_hidden_layers": 10_000, "num_labels": 10_000}
"""transformers makes a list of so many before anybody could compare it with the weights."""
_OTHER_FILES = ("configuration_files", "transformers_weights")
"""With these transformers reads other files than config.json and model.safetensors."""


class HfFolder:
    """A model folder. `config` and `shape` are read at once; the weights need not be there until one is asked for."""

    def __init__(self, path: str | Path, *, lora_adapter: Path | None = None) -> None:
        """Open the folder.

        Args:
            lora_adapter: folder of an adapter, see lora.py, that is merged into the weights as they are read.

        Raises:
            ValueError: no usable config.json, or a model that we cannot convert; one line, naming the file.
        """
        self.path = Path(path)
        self._lora_adapter = lora_adapter
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
        _ = self.stored

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
        parts = [self.stored[hf_name] for hf_name in hf_names_of(self.shape, name)]
        return shard(parts, spec, tp_rank, tp_size, padded_vocab_size)

    def tensor(self, hf_name: str) -> Tensor:
        """One whole tensor under its Hugging Face name, in the stored dtype.

        Raises:
            ValueError: as `check_weights`.
        """
        return self.stored[hf_name][:]

    @cached_property
    def stored(self) -> Mapping[str, StoredTensor | AdaptedTensor]:
        """Where each tensor of this model lies, by its Hugging Face name.

        Raises:
            ValueError: as `check_weights`.
        """
        if (self.path / ADAPTER_CONFIG_FILE).exists():  # transformers would load the model that it names instead
            raise ValueError(
                f"{self.path / ADAPTER_CONFIG_FILE}: an adapter beside the weights; put it into a folder of its own"
            )
        found = open_weight_files(self.path)
        num_experts = sum(self.shape.moe.layers) * self.shape.num_moe_experts if self.shape.moe else 0
        for what, count in (("num_hidden_layers", self.shape.num_layers), ("experts in all layers", num_experts)):
            if count > len(found):  # before a name is made for every tensor of so many
                raise ValueError(
                    f"{self.path}: config.json has {what} {count}, but the files hold {len(found)} tensors"
                )
        expected = expected_hf_shapes(self.shape)
        for name, tensor in sorted(found.items()):
            if name in expected:
                if tensor.shape != expected[name]:
                    raise ValueError(
                        f"{tensor.path}: tensor {name!r} has shape {list(tensor.shape)}, "
                        f"config.json makes it {list(expected[name])}"
                    )
            elif name == "lm_head.weight":
                _check_tied_copy(tensor, found.get("model.embed_tokens.weight"))
            elif not name.endswith(".rotary_emb.inv_freq"):  # a constant that old transformers saved with the weights
                raise ValueError(
                    f"{tensor.path} holds tensor {name!r}, which a {self.shape.model_type} model does not have"
                )
        for name in expected:
            if name not in found:
                raise ValueError(f"{self.path}: no file holds tensor {name!r}")
        weights = {name: found[name] for name in expected}
        return weights if self._lora_adapter is None else with_adapter(weights, self._lora_adapter)


def _read_config(path: Path) -> PreTrainedConfig:
    """The configuration, by transformers' own class for a family that we know; never by code from the folder."""
    raw = read_json(path)
    for name, most in _MOST.items():
        if isinstance(raw.get(name), int) and raw[name] > most:
            raise ValueError(f"{path}: {name} {raw[name]}, expected at most {most}")
    for name in _OTHER_FILES:
        if raw.get(name) is not None:
            raise ValueError(f"{path}: {name} names other files, which would not be read")
    try:
        family_of(raw.get("model_type"), raw.get("architectures"))
        return AutoConfig.from_pretrained(path.parent, trust_remote_code=False, local_files_only=True)
    except (
        ValueError, TypeError, KeyError, AttributeError, ArithmeticError, OSError, StrictDataclassError
    ) as error:  # fmt: skip
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _check_tied_copy(copy: StoredTensor, embedding: StoredTensor | None) -> None:
    """Accept an output layer beside tied embeddings only if it equals them, so that nothing is dropped."""
    same = embedding is not None and copy.shape == embedding.shape
    for start in range(0, copy.shape[0] if same else 0, _ROWS_COMPARED_AT_ONCE):
        rows = slice(start, start + _ROWS_COMPARED_AT_ONCE)
        same = same and torch.equal(copy[rows], embedding[rows])
    if not same:
        raise ValueError(
            f"{copy.path}: config.json ties the embeddings, "
            "but 'lm_head.weight' differs from 'model.embed_tokens.weight'"
        )
