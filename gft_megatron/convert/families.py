"""The tables: which Hugging Face tensors make up each Megatron-Core parameter, for every model family we convert.

A new family is one more `Family` in FAMILIES. Megatron's names are those of its GPTModel; {i} is the layer's number in
the whole model, not in a pipeline stage. Hugging Face's names are those of transformers' modeling files.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


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


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

_MEGATRON_LAYER = "decoder.layers.{i}."
_HF_LAYER = "model.layers.{i}."


def _whole_model(megatron_name: str, layout: Layout, hf_name: str, *dims: str) -> Entry:
    return Entry((megatron_name,), layout, (Part(hf_name, dims),))


def _in_layer(megatron_names: str | tuple[str, ...], layout: Layout, *parts: tuple[str, ...]) -> Entry:
    names = (megatron_names,) if isinstance(megatron_names, str) else megatron_names
    return Entry(
        tuple(_MEGATRON_LAYER + name for name in names),
        layout,
        tuple(Part(_HF_LAYER + hf_name, tuple(dims)) for hf_name, *dims in parts),
    )


_EMBEDDINGS_AND_FINAL_NORM = (
    _whole_model(EMBEDDING, Layout.VOCAB, "model.embed_tokens.weight", "vocab_size", "hidden_size"),
    _whole_model("decoder.final_layernorm.weight", Layout.REPLICATED, "model.norm.weight", "hidden_size"),
    _whole_model(OUTPUT_LAYER, Layout.VOCAB, "lm_head.weight", "vocab_size", "hidden_size"),
)

_NORMS = (
    _in_layer(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        Layout.REPLICATED,
        ("input_layernorm.weight", "hidden_size"),
    ),
    _in_layer(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        Layout.REPLICATED,
        ("post_attention_layernorm.weight", "hidden_size"),
    ),
)

_ATTENTION = (
    _in_layer(
        "self_attention.linear_qkv.weight",
        Layout.QKV,
        ("self_attn.q_proj.weight", "query_size", "hidden_size"),
        ("self_attn.k_proj.weight", "key_value_size", "hidden_size"),
        ("self_attn.v_proj.weight", "key_value_size", "hidden_size"),
    ),
    _in_layer(
        "self_attention.linear_proj.weight", Layout.ROW, ("self_attn.o_proj.weight", "hidden_size", "query_size")
    ),
)

_QKV_BIAS = (
    _in_layer(
        "self_attention.linear_qkv.bias",
        Layout.QKV,
        ("self_attn.q_proj.bias", "query_size"),
        ("self_attn.k_proj.bias", "key_value_size"),
        ("self_attn.v_proj.bias", "key_value_size"),
    ),
)

_QK_NORMS = (
    _in_layer("self_attention.q_layernorm.weight", Layout.REPLICATED, ("self_attn.q_norm.weight", "kv_channels")),
    _in_layer("self_attention.k_layernorm.weight", Layout.REPLICATED, ("self_attn.k_norm.weight", "kv_channels")),
)

_SWIGLU = (
    _in_layer(
        "mlp.linear_fc1.weight",
        Layout.GATED,
        ("mlp.gate_proj.weight", "ffn_hidden_size", "hidden_size"),
        ("mlp.up_proj.weight", "ffn_hidden_size", "hidden_size"),
    ),
    _in_layer("mlp.linear_fc2.weight", Layout.ROW, ("mlp.down_proj.weight", "hidden_size", "ffn_hidden_size")),
)

_LLAMA = (*_EMBEDDINGS_AND_FINAL_NORM, *_NORMS, *_ATTENTION, *_SWIGLU)

FAMILIES = (
    Family("llama", "LlamaForCausalLM", _LLAMA),
    Family("qwen2", "Qwen2ForCausalLM", (*_LLAMA, *_QKV_BIAS), add_qkv_bias=True),
    Family("qwen3", "Qwen3ForCausalLM", (*_LLAMA, *_QK_NORMS), qk_layernorm=True),
)


def family_of(model_type: str | None, architectures: list[str] | None) -> Family:
    """The family of a config.json with these two fields; `architectures` may be missing.

    Raises:
        ValueError: a model that no table describes; the message lists those that have one.
    """
    for family in FAMILIES:
        if family.model_type == model_type and (architectures or [family.architecture]) == [family.architecture]:
            return family
    known = ", ".join(f"{family.architecture} (model_type {family.model_type!r})" for family in FAMILIES)
    raise ValueError(f"cannot convert architectures {architectures}, model_type {model_type!r}; known: {known}")
