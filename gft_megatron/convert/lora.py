"""Merge a LoRA adapter in the format of Hugging Face's PEFT into the weights that it was trained on, a slice at a time.

W' = W + s B A with s = lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilised LoRA (LoraLayer.get_delta_weight and
update_layer in peft/tuners/lora/layer.py). Computed in float32, rounded once to the dtype of W.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gft_megatron.convert.stored_tensor import StoredTensor
from gft_megatron.convert.weight_files import read_json, refuse_to_leave, tensors_in

ADAPTER_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")

_UNSUPPORTED = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
"""Fields of adapter_config.json with the only value that a product of two matrices stands for."""

_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start the factors that take something out of the base weights, which a folder of the base does not show."""


@dataclass(frozen=True)
class AdaptedTensor:
    """A stored weight with its adapter; read like a `StoredTensor`."""

    base: StoredTensor  # [out, in]
    a: StoredTensor  # [r, in]
    b: StoredTensor  # [out, r]
    scale: float

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """As `StoredTensor[index]`."""
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        delta = self.b[rows].float() @ self.a[:, columns].float()
        return (self.base[rows, columns].float() + self.scale * delta).to(self.dtype)


def with_adapter(weights: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor | AdaptedTensor]:
    """The weights of a model, those that the adapter changes merged with it.

    Args:
        weights: by Hugging Face name.
        folder: adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: something in the folder that is no plain LoRA of this model; one line, naming the file.
    """
    config = _read_config(folder / ADAPTER_CONFIG_FILE)
    path = folder / _WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} lacks {_WEIGHTS_FILE}; adapters in other formats (adapter_model.bin) are never read"
        )
    refuse_to_leave(folder, path)
    factors: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors_in(path).items():
        match = _NAME.fullmatch(name)
        if match is None or f"{match['module']}.weight" not in weights:
            raise ValueError(f"{path} holds tensor {name!r}, which adapts no weight of this model")
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
    if not factors:
        raise ValueError(f"{path} holds no tensors")
    adapted = {
        f"{module}.weight": _adapted(path, module, weights[f"{module}.weight"], pair, config)
        for module, pair in factors.items()
    }
    return {**weights, **adapted}


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {config.get('peft_type')!r}, expected 'LORA'")
    for field, expected in _UNSUPPORTED.items():
        if (found := config.get(field, expected)) != expected and found:
            raise ValueError(f"{path}: {field} {found!r} cannot be merged, expected {expected!r}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        raise ValueError(
            f"{path}: init_lora_weights {start!r} has changed the base weights too; save the adapter with "
            "path_initial_model_for_weight_conversion first"
        )
    for name, alpha in {"": config.get("lora_alpha"), **(config.get("alpha_pattern") or {})}.items():
        if not re.fullmatch(r"[\w.]*", name):
            raise ValueError(f"{path}: alpha_pattern {name!r}, expected the name of a module or the end of one")
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ValueError(f"{path}: lora_alpha {alpha!r}, expected a number")
    return config


def _adapted(
    path: Path, module: str, base: StoredTensor, pair: dict[str, StoredTensor], config: dict[str, Any]
) -> AdaptedTensor:
    for factor in "AB":
        if factor not in pair:
            raise ValueError(f"{path}: {module} lacks its lora_{factor}")
    a, b = pair["A"], pair["B"]
    fits = len(base.shape) == len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
    if not fits or (b.shape[0], a.shape[1]) != base.shape:
        raise ValueError(
            f"{path}: {module} has lora_B {list(b.shape)} and lora_A {list(a.shape)}, which make no {list(base.shape)}"
        )
    alpha = next(
        (value for end, value in (config.get("alpha_pattern") or {}).items() if f".{module}".endswith(f".{end}")),
        config["lora_alpha"],
    )
    return AdaptedTensor(base, a, b, alpha / (math.sqrt(a.shape[0]) if config.get("use_rslora") else a.shape[0]))
