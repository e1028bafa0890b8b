"""Mixtral: experts in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gft_megatron.convert.families.tables import DECODER, Family, MoeShape, refuse, swiglu_experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _read_moe(config: PreTrainedConfig) -> MoeShape:
    if config.router_jitter_noise:
        refuse(config, f"router_jitter_noise {config.router_jitter_noise}, expected 0")
    return MoeShape(
        num_experts=config.num_local_experts,
        ffn_hidden_size=config.intermediate_size,
        router_topk=config.num_experts_per_tok,
        router_pre_softmax=False,
        layers=(True,) * config.num_hidden_layers,
    )


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    (
        *DECODER,
        *swiglu_experts(
            "block_sparse_moe.gate.weight",
            "block_sparse_moe.experts.{e}.w1.weight",
            "block_sparse_moe.experts.{e}.w3.weight",
            "block_sparse_moe.experts.{e}.w2.weight",
        ),
    ),
    has_sliding_window=True,
    read_moe=_read_moe,
)
