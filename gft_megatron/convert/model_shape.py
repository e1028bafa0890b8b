"""What Megatron-Core has to know to build the model of a Hugging Face configuration, and a refusal of what it cannot.

Settings of the run that a configuration may also hold (dropout, key-value cache) are not read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gft_megatron.convert.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Fixed in RotaryEmbedding._apply_scaling, megatron/core/models/common/embeddings/rotary_pos_embedding.py (0.16.1 to
# 0.19.2); only the factor can be set.
_MEGATRON_LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes and switches of a decoder, in the names of Megatron's TransformerConfig and GPTModel."""

    model_type: str
    """Picks the family, see families.py."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key-value heads."""
    kv_channels: int
    """Width of a head."""
    vocab_size: int
    """Without padding."""
    max_position_embeddings: int
    layernorm_epsilon: float
    initializer_range: float
    add_qkv_bias: bool
    qk_layernorm: bool
    rotary_base: float
    rope_scaling_factor: float | None
    """Factor of Llama 3's rope scaling; None: not scaled."""
    tie_word_embeddings: bool
    dtype: torch.dtype
    """Of the stored weights, as the configuration has it; float32 where it does not say."""

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def key_value_size(self) -> int:
        return self.num_query_groups * self.kv_channels

    @staticmethod
    def from_hf(config: PreTrainedConfig) -> ModelShape:
        """Read a configuration as transformers 5 gives it (AutoConfig, `rope_parameters`).

        Raises:
            ValueError: the model has something that we would not compute right.
        """
        family = family_of(config.model_type, config.architectures)
        _refuse_what_megatron_would_compute_wrong(config)
        head_dim = getattr(config, "head_dim", None)
        rotary_base, rope_scaling_factor = _rope(config)
        return ModelShape(
            model_type=family.model_type,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_key_value_heads,
            kv_channels=config.hidden_size // config.num_attention_heads if head_dim is None else head_dim,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            layernorm_epsilon=config.rms_norm_eps,
            initializer_range=config.initializer_range,
            add_qkv_bias=family.add_qkv_bias,
            qk_layernorm=family.qk_layernorm,
            rotary_base=rotary_base,
            rope_scaling_factor=rope_scaling_factor,
            tie_word_embeddings=config.tie_word_embeddings,
            dtype=config.dtype or torch.float32,
        )

    def check_tensor_parallel_size(self, tp_size: int) -> None:
        """Refuse a tensor-parallel size that would cut a key-value head or leave ranks unequal.

        Query heads are a multiple of the key-value heads, and vocabulary rows are padded: neither needs a check.

        Raises:
            ValueError: names the flag and the sizes that this model allows.
        """
        divisible = math.gcd(self.num_query_groups, self.ffn_hidden_size)
        if tp_size < 1 or divisible % tp_size:
            allowed = [size for size in range(1, divisible + 1) if divisible % size == 0]
            raise ValueError(
                f"--tensor-model-parallel-size {tp_size} does not divide this model's {self.num_query_groups} "
                f"key-value heads and MLP width {self.ffn_hidden_size}; allowed: {allowed}"
            )


def _refuse_what_megatron_would_compute_wrong(config: PreTrainedConfig) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f"cannot convert this {config.model_type} model: {what}")

    if getattr(config, "quantization_config", None) is not None:
        refuse("its weights are quantized (quantization_config); use the checkpoint it was quantized from")
    if getattr(config, "auto_map", None):
        refuse("it brings its own code (auto_map), which is never run")
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        refuse(f"layer_types {sorted(set(config.layer_types))}, only full_attention is supported (use_sliding_window)")
    for bias in ("attention_bias", "mlp_bias"):
        if getattr(config, bias, False):
            refuse(f"{bias} is true; no released model of this family has it and there is no table for it")
    if config.hidden_act != "silu":
        refuse(f"hidden_act {config.hidden_act!r}, expected 'silu'")
    for size in _SIZES:
        value = getattr(config, size, None)
        if value is not None and value < 1:
            refuse(f"{size} {value}, expected at least 1")
    if config.num_attention_heads % config.num_key_value_heads:
        refuse(
            f"{config.num_attention_heads} heads are not a multiple of num_key_value_heads {config.num_key_value_heads}"
        )
    if config.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        refuse(f"dtype {config.dtype}, expected float32, bfloat16 or float16")


def _rope(config: PreTrainedConfig) -> tuple[float, float | None]:
    """(base, factor of Llama 3's scaling or None)."""
    rope: dict[str, Any] = config.rope_parameters
    rope_type = rope["rope_type"]
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rope_type {rope_type!r} is not supported, expected 'default' or 'llama3'")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported, expected 1.0")
    if rope_type == "default":
        return rope["rope_theta"], None
    found = {name: rope[name] for name in _MEGATRON_LLAMA3_ROPE}
    if found != _MEGATRON_LLAMA3_ROPE:
        raise ValueError(f"llama3 rope scaling with {found}; Megatron-Core computes only {_MEGATRON_LLAMA3_ROPE}")
    return rope["rope_theta"], rope["factor"]
