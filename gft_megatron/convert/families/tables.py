"""What a family's table is made of, and the entries that families share.

Megatron's names are those of its GPTModel; {i} is the layer's number in the whole model, not in a pipeline stage, and
{e} the expert's number in its layer, not on a rank. Hugging Face's names are those of the files that transformers
writes: in memory transformers 5 keeps all experts of a layer in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Layout(StrEnum):
    """How Hugging Face tensors lie in the Megatron parameter, and how tensor-parallel ranks share it: see layout.py."""

    REPLICATED = "replicated"
    """Every rank holds all of it."""
    COLUMN = "column"
    """Rows (output features) are divided over the ranks."""
    ROW = "row"
    """Columns (input features) are divided over the ranks."""
    VOCAB = "vocab"
    """Rows are divided over the ranks, after zero rows were added to a number that divides."""
    QKV = "qkv"
    """Each key-value head with its query heads is one run of rows [queries, key, value]; ranks get whole runs."""
    GATED = "gated"
    """Each rank holds [its rows of the gate, its rows of the up projection]."""


class Layers(StrEnum):
    """The layers that have a parameter; what belongs to no layer is in ALL."""

    ALL = "all"
    DENSE = "dense"
    """Those whose MLP is one."""
    MOE = "moe"
    """Those whose MLP is a router and experts."""


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor and its shape, in names of `ModelShape` attributes."""

    name: str
    dims: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and what it is made of, in the order that the layout wants."""

    names: tuple[str, ...]
    """The parameter's names: with the local layer spec, then with Transformer Engine's where it differs."""
    layout: Layout
    parts: tuple[Part, ...]
    """With a dimension of 0 in any, this model does not have the parameter."""
    layers: Layers = Layers.ALL

    @property
    def is_expert(self) -> bool:
        """Whether there is one for each expert, divided over the expert-tensor-parallel ranks."""
        return "{e}" in self.names[0]


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """The layers of experts of one model."""

    num_experts: int
    ffn_hidden_size: int
    """Of one expert."""
    router_topk: int
    """Experts that a token is sent to."""
    router_pre_softmax: bool
    """Their weights come from a softmax over all experts, and sum to less than 1; else from one over the chosen."""
    layers: tuple[bool, ...]
    """Which layers have experts; at least one has."""
    sigmoid: MoeSigmoid | None = None
    """A router of sigmoids with a bias for each expert; None: of a softmax without."""
    shared_ffn_hidden_size: int = 0
    """Of the expert that every token goes to; 0: there is none."""


@dataclass(frozen=True, kw_only=True)
class MoeSigmoid:
    """DeepSeek-V3's router."""

    num_groups: int | None
    """Groups that the experts are divided into, None: one."""
    group_topk: int | None
    """Groups that a token's experts are chosen from."""
    scaling_factor: float
    """Of the weights, which sum to 1 without it."""


@dataclass(frozen=True, kw_only=True)
class MlaShape:
    """Multi-head latent attention, in the names of Megatron's MLATransformerConfig."""

    q_lora_rank: int
    """0: queries are not compressed."""
    kv_lora_rank: int
    qk_head_dim: int
    """Width of a head's part that is not rotated."""
    qk_pos_emb_head_dim: int
    v_head_dim: int
    yarn: tuple[tuple[str, float], ...] | None
    """Settings of YaRN's rope; None: plain rope."""


@dataclass(frozen=True)
class Family:
    """Models that share one set of parameter names."""

    model_type: str
    """`model_type` of config.json."""
    architecture: str
    """The only name we accept in `architectures` of config.json."""
    entries: tuple[Entry, ...]
    """Every parameter of a model whose output layer is its own."""
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    has_sliding_window: bool = False
    """Every layer attends to the last `sliding_window` tokens only, where the configuration has a number there."""
    read_mla: Callable[[PreTrainedConfig], MlaShape] | None = None
    """Reads latent attention from a configuration; raises ValueError as `refuse` does."""
    read_moe: Callable[[PreTrainedConfig], MoeShape | None] | None = None
    """Reads the experts from a configuration, None where no layer has any; raises ValueError as `refuse` does."""


def refuse(config: PreTrainedConfig, what: str) -> None:
    """Raises: ValueError: the model has something that we would not compute right."""
    raise ValueError(f"cannot convert this {config.model_type} model: {what}")


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

KEPT_IN_FLOAT32 = (".e_score_correction_bias",)
"""How the tensors end that are stored in float32 whatever the model is in; transformers and Megatron keep them so."""


def dtype_kept(hf_name: str, dtype: torch.dtype) -> torch.dtype:
    """What the tensor is stored in where the model is in `dtype`."""
    return torch.float32 if hf_name.endswith(KEPT_IN_FLOAT32) else dtype


_MEGATRON_LAYER = "decoder.layers.{i}."
_HF_LAYER = "model.layers.{i}."


def whole_model(megatron_name: str, layout: Layout, hf_name: str, *dims: str) -> Entry:
    return Entry((megatron_name,), layout, (Part(hf_name, dims),))


def in_layer(
    megatron_names: str | tuple[str, ...], layout: Layout, *parts: tuple[str, ...], layers: Layers = Layers.ALL
) -> Entry:
    """An entry for each layer: parts are (Hugging Face name, dimensions ...)."""
    names = (megatron_names,) if isinstance(megatron_names, str) else megatron_names
    return Entry(
        tuple(_MEGATRON_LAYER + name for name in names),
        layout,
        tuple(Part(_HF_LAYER + hf_name, tuple(dims)) for hf_name, *dims in parts),
        layers,
    )


EMBEDDINGS_AND_FINAL_NORM = (
    whole_model(EMBEDDING, Layout.VOCAB, "model.embed_tokens.weight", "vocab_size", "hidden_size"),
    whole_model("decoder.final_layernorm.weight", Layout.REPLICATED, "model.norm.weight", "hidden_size"),
    whole_model(OUTPUT_LAYER, Layout.VOCAB, "lm_head.weight", "vocab_size", "hidden_size"),
)

INPUT_NORM = (
    in_layer(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        Layout.REPLICATED,
        ("input_layernorm.weight", "hidden_size"),
    ),
)

PRE_MLP_NORMS = (
    in_layer(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        Layout.REPLICATED,
        ("post_attention_layernorm.weight", "hidden_size"),
        layers=Layers.DENSE,
    ),
    in_layer(  # no linear layer comes next that Transformer Engine could fuse it with
        "pre_mlp_layernorm.weight",
        Layout.REPLICATED,
        ("post_attention_layernorm.weight", "hidden_size"),
        layers=Layers.MOE,
    ),
)

ATTENTION = (
    in_layer(
        "self_attention.linear_qkv.weight",
        Layout.QKV,
        ("self_attn.q_proj.weight", "query_size", "hidden_size"),
        ("self_attn.k_proj.weight", "key_value_size", "hidden_size"),
        ("self_attn.v_proj.weight", "key_value_size", "hidden_size"),
    ),
    in_layer("self_attention.linear_proj.weight", Layout.ROW, ("self_attn.o_proj.weight", "hidden_size", "query_size")),
)

QKV_BIAS = (
    in_layer(
        "self_attention.linear_qkv.bias",
        Layout.QKV,
        ("self_attn.q_proj.bias", "query_size"),
        ("self_attn.k_proj.bias", "key_value_size"),
        ("self_attn.v_proj.bias", "key_value_size"),
    ),
)

QK_NORMS = (
    in_layer("self_attention.q_layernorm.weight", Layout.REPLICATED, ("self_attn.q_norm.weight", "kv_channels")),
    in_layer("self_attention.k_layernorm.weight", Layout.REPLICATED, ("self_attn.k_norm.weight", "kv_channels")),
)

SWIGLU = (
    in_layer(
        "mlp.linear_fc1.weight",
        Layout.GATED,
        ("mlp.gate_proj.weight", "ffn_hidden_size", "hidden_size"),
        ("mlp.up_proj.weight", "ffn_hidden_size", "hidden_size"),
        layers=Layers.DENSE,
    ),
    in_layer(
        "mlp.linear_fc2.weight",
        Layout.ROW,
        ("mlp.down_proj.weight", "hidden_size", "ffn_hidden_size"),
        layers=Layers.DENSE,
    ),
)


def swiglu_experts(router: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    """A router and experts of three matrices each; names in a layer, with {e} in those of the experts."""
    fc1, fc2 = (
        (f"mlp.experts.local_experts.{{e}}.{linear}.weight", f"mlp.experts.{linear}.weight{{e}}")
        for linear in ("linear_fc1", "linear_fc2")
    )
    return (
        in_layer("mlp.router.weight", Layout.REPLICATED, (router, "num_moe_experts", "hidden_size"), layers=Layers.MOE),
        in_layer(
            fc1,
            Layout.GATED,
            (gate, "moe_ffn_hidden_size", "hidden_size"),
            (up, "moe_ffn_hidden_size", "hidden_size"),
            layers=Layers.MOE,
        ),
        in_layer(fc2, Layout.ROW, (down, "hidden_size", "moe_ffn_hidden_size"), layers=Layers.MOE),
    )


DECODER = (*EMBEDDINGS_AND_FINAL_NORM, *INPUT_NORM, *PRE_MLP_NORMS, *ATTENTION)
"""Everything of a Llama but the MLP."""
