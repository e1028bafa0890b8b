"""Qwen3-MoE: Qwen 3 with experts in all layers or in some."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gft_megatron.convert.families.tables import DECODER, QK_NORMS, SWIGLU, Family, MoeShape, swiglu_experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _read_moe(config: PreTrainedConfig) -> MoeShape | None:
    # Qwen3MoeDecoderLayer, transformers/models/qwen3_moe/modeling_qwen3_moe.py
    layers = tuple(
        layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(config.num_hidden_layers)
    )
    if not any(layers):
        return None
    return MoeShape(
        num_experts=config.num_experts,
        ffn_hidden_size=config.moe_intermediate_size,
        router_topk=config.num_experts_per_tok,
        router_pre_softmax=not config.norm_topk_prob,
        layers=layers,
    )


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    (
        *DECODER,
        *QK_NORMS,
        *SWIGLU,
        *swiglu_experts(
            "mlp.gate.weight",
            "mlp.experts.{e}.gate_proj.weight",
            "mlp.experts.{e}.up_proj.weight",
            "mlp.experts.{e}.down_proj.weight",
        ),
    ),
    qk_layernorm=True,
    has_sliding_window=True,
    read_moe=_read_moe,
)
