"""DeepSeek-V3: latent attention, a router of sigmoids, a shared expert; no layers that predict further tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gft_megatron.convert.families.tables import (
    EMBEDDINGS_AND_FINAL_NORM,
    PRE_MLP_NORMS,
    SWIGLU,
    Family,
    Layers,
    Layout,
    MlaShape,
    MoeShape,
    MoeSigmoid,
    in_layer,
    refuse,
    swiglu_experts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_YARN = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}


_MAY_BE_NULL = ("v_head_dim", "n_group", "topk_group", "num_experts_per_tok", "first_k_dense_replace")


_OF_THE_FIRST_CODE = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
"""Fields that the code released with the model had, and transformers ignores, with the only values that it computes."""


def _read_mla(config: PreTrainedConfig) -> MlaShape:
    for name in _MAY_BE_NULL:
        if getattr(config, name) is None:
            refuse(config, f"{name} is null, expected a number")
    if config.rms_norm_eps != 1e-6:  # transformers takes it for the norms of the layers, not for those of the latents
        refuse(config, f"rms_norm_eps {config.rms_norm_eps}, expected 1e-06, which the norms of its latents have")
    if not config.rope_interleave:
        refuse(config, "rope_interleave is false, expected true")
    if config.num_key_value_heads != config.num_attention_heads:
        refuse(config, f"num_key_value_heads {config.num_key_value_heads}, expected {config.num_attention_heads}")
    return MlaShape(
        q_lora_rank=config.q_lora_rank or 0,
        kv_lora_rank=config.kv_lora_rank,
        qk_head_dim=config.qk_nope_head_dim,
        qk_pos_emb_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        yarn=_read_yarn(config),
    )


def _read_yarn(config: PreTrainedConfig) -> tuple[tuple[str, float], ...] | None:
    rope = {name: value for name, value in config.rope_parameters.items() if value is not None}
    rope_type = rope.pop("rope_type")
    rope.pop("rope_theta")
    rope.pop("type", None)  # what rope_type was called when DeepSeek-V3 was released; transformers keeps both
    if rope_type == "default":
        return None
    if rope_type != "yarn" or rope.keys() != _YARN:
        refuse(
            config, f"rope_type {rope_type!r} with {sorted(rope)}; expected 'default', or 'yarn' with {sorted(_YARN)}"
        )
    for name, value in rope.items():
        if type(value) not in (int, float) or not value > 0:  # transformers takes defaults in the place of 0
            refuse(config, f"yarn with {name} {value!r}, expected a number above 0")
    return tuple(sorted(rope.items()))


def _read_moe(config: PreTrainedConfig) -> MoeShape | None:
    for name, expected in _OF_THE_FIRST_CODE.items():
        if (found := getattr(config, name, expected)) != expected:
            refuse(config, f"{name} {found!r}, expected {expected!r}")
    if config.num_mtp_layers:
        refuse(config, f"num_nextn_predict_layers {config.num_mtp_layers}, expected 0; there is no table for them")
    if not config.routed_scaling_factor > 0:
        refuse(config, f"routed_scaling_factor {config.routed_scaling_factor}, expected a number above 0")
    if not config.norm_topk_prob:
        refuse(config, "norm_topk_prob is false; Megatron normalizes the weights of a sigmoid router")
    groups, chosen = (config.n_group, config.topk_group) if config.n_group != 1 else (None, None)
    if groups and config.num_experts_per_tok != 2 * chosen:
        # A group is worth its two best experts; in Megatron its (experts a token / chosen groups) best.
        refuse(config, f"num_experts_per_tok {config.num_experts_per_tok}, expected twice its topk_group {chosen}")
    layers = tuple(layer >= config.first_k_dense_replace for layer in range(config.num_hidden_layers))
    if not any(layers):
        return None
    return MoeShape(
        num_experts=config.n_routed_experts,
        ffn_hidden_size=config.moe_intermediate_size,
        router_topk=config.num_experts_per_tok,
        router_pre_softmax=False,
        layers=layers,
        sigmoid=MoeSigmoid(num_groups=groups, group_topk=chosen, scaling_factor=config.routed_scaling_factor),
        shared_ffn_hidden_size=config.moe_intermediate_size * config.n_shared_experts,
    )


_LATENT_ATTENTION = (
    in_layer("input_layernorm.weight", Layout.REPLICATED, ("input_layernorm.weight", "hidden_size")),
    in_layer(
        "self_attention.linear_q_proj.weight",
        Layout.COLUMN,
        ("self_attn.q_proj.weight", "uncompressed_query_size", "hidden_size"),
    ),
    in_layer(
        "self_attention.linear_q_down_proj.weight",
        Layout.REPLICATED,
        ("self_attn.q_a_proj.weight", "q_lora_rank", "hidden_size"),
    ),
    in_layer(
        ("self_attention.q_layernorm.weight", "self_attention.linear_q_up_proj.layer_norm_weight"),
        Layout.REPLICATED,
        ("self_attn.q_a_layernorm.weight", "q_lora_rank"),
    ),
    in_layer(
        "self_attention.linear_q_up_proj.weight",
        Layout.COLUMN,
        ("self_attn.q_b_proj.weight", "query_size", "q_lora_rank"),
    ),
    in_layer(
        "self_attention.linear_kv_down_proj.weight",
        Layout.REPLICATED,
        ("self_attn.kv_a_proj_with_mqa.weight", "kv_latent_size", "hidden_size"),
    ),
    in_layer(
        ("self_attention.kv_layernorm.weight", "self_attention.linear_kv_up_proj.layer_norm_weight"),
        Layout.REPLICATED,
        ("self_attn.kv_a_layernorm.weight", "kv_lora_rank"),
    ),
    in_layer(
        "self_attention.linear_kv_up_proj.weight",
        Layout.COLUMN,
        ("self_attn.kv_b_proj.weight", "key_value_size", "kv_lora_rank"),
    ),
    in_layer(
        "self_attention.linear_proj.weight", Layout.ROW, ("self_attn.o_proj.weight", "hidden_size", "context_size")
    ),
)

_SHARED_EXPERT = (
    in_layer(
        "mlp.shared_experts.linear_fc1.weight",
        Layout.GATED,
        ("mlp.shared_experts.gate_proj.weight", "shared_ffn_hidden_size", "hidden_size"),
        ("mlp.shared_experts.up_proj.weight", "shared_ffn_hidden_size", "hidden_size"),
        layers=Layers.MOE,
    ),
    in_layer(
        "mlp.shared_experts.linear_fc2.weight",
        Layout.ROW,
        ("mlp.shared_experts.down_proj.weight", "hidden_size", "shared_ffn_hidden_size"),
        layers=Layers.MOE,
    ),
)

DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    (
        *EMBEDDINGS_AND_FINAL_NORM,
        *_LATENT_ATTENTION,
        *PRE_MLP_NORMS,
        *SWIGLU,
        *swiglu_experts(
            "mlp.gate.weight",
            "mlp.experts.{e}.gate_proj.weight",
            "mlp.experts.{e}.up_proj.weight",
            "mlp.experts.{e}.down_proj.weight",
        ),
        in_layer(
            "mlp.router.expert_bias",
            Layout.REPLICATED,
            ("mlp.gate.e_score_correction_bias", "num_moe_experts"),
            layers=Layers.MOE,
        ),
        *_SHARED_EXPERT,
    ),
    read_mla=_read_mla,
    read_moe=_read_moe,
)
