"""What Megatron-Core has to know to build the model of a Hugging Face configuration, and a refusal of what it cannot.

Settings of the run that a configuration may also hold (dropout, key-value cache) are not read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gft_megatron.convert.families import Family, Layers, MlaShape, MoeShape, family_of
from gft_megatron.convert.families.tables import refuse

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
    "sliding_window",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_group",
    "topk_group",
)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes and switches of a decoder, in the names of Megatron's TransformerConfig and GPTModel."""

    model_type: str
    """Picks the family, see families/."""
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
    sliding_window: int | None = None
    """Tokens that a token attends to, itself included; None: all before it."""
    moe: MoeShape | None = None
    """None: no layer has experts."""
    mla: MlaShape | None = None
    """None: keys and values are projected as they are."""

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def key_value_size(self) -> int:
        """Of the keys, and of the values; of latent attention, keys and values together, without the rotated part."""
        if self.mla:
            return self.num_attention_heads * (self.mla.qk_head_dim + self.mla.v_head_dim)
        return self.num_query_groups * self.kv_channels

    @property
    def q_lora_rank(self) -> int:
        return self.mla.q_lora_rank if self.mla else 0

    @property
    def uncompressed_query_size(self) -> int:
        return 0 if self.q_lora_rank else self.query_size

    @property
    def kv_lora_rank(self) -> int:
        return self.mla.kv_lora_rank if self.mla else 0

    @property
    def kv_latent_size(self) -> int:
        return self.mla.kv_lora_rank + self.mla.qk_pos_emb_head_dim if self.mla else 0

    @property
    def context_size(self) -> int:
        return self.num_attention_heads * (self.mla.v_head_dim if self.mla else self.kv_channels)

    @property
    def shared_ffn_hidden_size(self) -> int:
        return self.moe.shared_ffn_hidden_size if self.moe else 0

    @property
    def num_moe_experts(self) -> int:
        return self.moe.num_experts if self.moe else 0

    @property
    def moe_ffn_hidden_size(self) -> int:
        return self.moe.ffn_hidden_size if self.moe else 0

    @property
    def has_equal_layers(self) -> bool:
        return self.moe is None or all(self.moe.layers)

    def layers_like(self, layer: int) -> Layers:
        """The kind of layer number `layer`."""
        return Layers.MOE if self.moe and self.moe.layers[layer] else Layers.DENSE

    @staticmethod
    def from_hf(config: PreTrainedConfig) -> ModelShape:
        """Read a configuration as transformers 5 gives it (AutoConfig, `rope_parameters`).

        Raises:
            ValueError: the model has something that we would not compute right.
        """
        family = family_of(config.model_type, config.architectures)
        _refuse_what_megatron_would_compute_wrong(config)
        head_dim = getattr(config, "head_dim", None)
        mla = family.read_mla(config) if family.read_mla else None
        if mla is not None:
            head_dim = mla.qk_head_dim + mla.qk_pos_emb_head_dim
        rotary_base, rope_scaling_factor = (config.rope_parameters["rope_theta"], None) if mla else _rope(config)
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
            sliding_window=_sliding_window(config, family),
            moe=_moe(config, family),
            mla=mla,
        )

    def check_tensor_parallel_size(self, tp_size: int) -> None:
        """Refuse a tensor-parallel size that would cut a key-value head or leave ranks unequal.

        Query heads are a multiple of the key-value heads, and vocabulary rows are padded: neither needs a check. Nor do
        experts, see `check_expert_tensor_parallel_size`.

        Raises:
            ValueError: names the flag and the sizes that this model allows.
        """
        has_mlp = self.moe is None or not all(self.moe.layers)
        sizes = {"MLP width": self.ffn_hidden_size if has_mlp else 0, "shared expert": self.shared_ffn_hidden_size}
        divisible = math.gcd(self.num_query_groups, *sizes.values())
        if tp_size < 1 or divisible % tp_size:
            mlp = "".join(f" and {name} {size}" for name, size in sizes.items() if size)
            raise ValueError(
                f"--tensor-model-parallel-size {tp_size} does not divide this model's {self.num_query_groups} "
                f"key-value heads{mlp}; allowed: {_divisors(divisible)}"
            )

    def check_expert_parallel_size(self, ep_size: int) -> None:
        """Refuse an expert-parallel size that would leave ranks with unequal numbers of experts.

        Raises:
            ValueError: names the flag and the sizes that this model allows.
        """
        self._check_experts("--expert-model-parallel-size", ep_size, self.num_moe_experts, "experts")

    def check_expert_tensor_parallel_size(self, etp_size: int) -> None:
        """Refuse a size that would divide an expert into unequal shares.

        Raises:
            ValueError: names the flag and the sizes that this model allows.
        """
        self._check_experts("--expert-tensor-parallel-size", etp_size, self.moe_ffn_hidden_size, "expert width")

    def _check_experts(self, flag: str, size: int, divisible: int, what: str) -> None:
        if not self.moe and size != 1:
            raise ValueError(f"{flag} {size}: this {self.model_type} model has no experts; leave it at 1")
        if self.moe and (size < 1 or divisible % size):
            raise ValueError(
                f"{flag} {size} does not divide this model's {what} {divisible}; allowed: {_divisors(divisible)}"
            )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _sliding_window(config: PreTrainedConfig, family: Family) -> int | None:
    window = config.sliding_window if family.has_sliding_window else None
    if window is not None and getattr(config, "max_window_layers", None):
        # Layers from there on, by the first code of Qwen3-MoE; all, by that of transformers 5.
        refuse(config, f"sliding_window {window} with max_window_layers {config.max_window_layers}, expected neither")
    return window if window is not None and window < config.max_position_embeddings else None


def _moe(config: PreTrainedConfig, family: Family) -> MoeShape | None:
    moe = family.read_moe(config) if family.read_moe else None
    if moe is None:
        return None
    if moe.router_topk > moe.num_experts:
        refuse(config, f"num_experts_per_tok {moe.router_topk}, expected at most its {moe.num_experts} experts")
    if moe.router_topk == 1 and not moe.router_pre_softmax:  # of sigmoids too: Megatron leaves a single one as it is
        refuse(config, "num_experts_per_tok 1 with normalized weights (norm_topk_prob), which are always 1")
    return moe


def _refuse_what_megatron_would_compute_wrong(config: PreTrainedConfig) -> None:
    if getattr(config, "quantization_config", None) is not None:
        refuse(config, "its weights are quantized (quantization_config); use the checkpoint it was quantized from")
    if getattr(config, "auto_map", None):
        refuse(config, "it brings its own code (auto_map), which is never run")
    if getattr(config, "is_heterogeneous", False):
        refuse(config, "its layers differ from each other (per_layer_config)")
    rope_theta = (config.rope_parameters or {}).get("rope_theta")
    if type(rope_theta) not in (int, float) or not rope_theta > 0 or "rope_type" not in config.rope_parameters:
        refuse(config, f"rope_parameters {config.rope_parameters}, expected one rope_theta above 0 for all layers")
    if getattr(config, "use_mrope", False):
        refuse(config, "use_mrope is true, expected the positions of a text model")
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        refuse(
            config,
            f"layer_types {sorted(set(config.layer_types))}, only full_attention is supported (use_sliding_window)",
        )
    for bias in ("attention_bias", "mlp_bias"):
        if getattr(config, bias, False):
            refuse(config, f"{bias} is true; no released model of this family has it and there is no table for it")
    if config.hidden_act != "silu":
        refuse(config, f"hidden_act {config.hidden_act!r}, expected 'silu'")
    for size in _SIZES:
        value = getattr(config, size, None)
        if value is not None and value < 1:
            refuse(config, f"{size} {value}, expected at least 1")
    if config.num_attention_heads % config.num_key_value_heads:
        heads = f"num_attention_heads {config.num_attention_heads}"
        refuse(config, f"{heads}, expected a multiple of num_key_value_heads {config.num_key_value_heads}")
    if config.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        refuse(config, f"dtype {config.dtype}, expected float32, bfloat16 or float16")


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
    if type(rope["factor"]) not in (int, float) or not rope["factor"] >= 1:
        raise ValueError(f"llama3 rope scaling with factor {rope['factor']!r}, expected at least 1")
    return rope["rope_theta"], rope["factor"]
