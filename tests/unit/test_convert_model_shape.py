"""What is read from a configuration, and what is refused because Megatron would compute something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import CONFIGS, CONFIGS_WITH_EXPERTS, DEEPSEEK_V3, LLAMA3_ROPE, QWEN3_MOE, SIZES, YARN
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from gft_megatron.convert import ModelShape
from gft_megatron.convert.families import MoeShape


def test_qwen2() -> None:
    assert ModelShape.from_hf(CONFIGS["qwen2-tied"]()) == ModelShape(
        model_type="qwen2",
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=80,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=8,
        vocab_size=131,
        max_position_embeddings=256,
        layernorm_epsilon=1e-6,
        initializer_range=0.02,
        add_qkv_bias=True,
        qk_layernorm=False,
        rotary_base=1e6,
        rope_scaling_factor=None,
        tie_word_embeddings=True,
        dtype=torch.float32,
    )


def test_qwen3_has_its_own_head_width_and_norms() -> None:
    shape = ModelShape.from_hf(CONFIGS["qwen3"]())
    assert (shape.kv_channels, shape.query_size, shape.key_value_size) == (16, 128, 64)
    assert shape.qk_layernorm and not shape.add_qkv_bias and not shape.tie_word_embeddings


def test_llama3_rope_scaling() -> None:
    assert ModelShape.from_hf(CONFIGS["llama2"]()).rope_scaling_factor is None
    shape = ModelShape.from_hf(CONFIGS["llama3-tied"]())
    assert (shape.rope_scaling_factor, shape.rotary_base) == (32.0, 500000.0)


def test_dtype_of_the_configuration() -> None:
    assert ModelShape.from_hf(LlamaConfig(dtype="bfloat16", **SIZES)).dtype is torch.bfloat16


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {**LLAMA3_ROPE, **changes}, "max_position_embeddings": 131072}


@pytest.mark.parametrize(
    ("config_class", "changes", "message"),
    [
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "use_sliding_window"),
        (Qwen3Config, {"attention_bias": True}, "attention_bias"),
        (LlamaConfig, {"attention_bias": True}, "attention_bias"),
        (LlamaConfig, {"mlp_bias": True}, "mlp_bias"),
        (LlamaConfig, {"hidden_act": "gelu"}, "'gelu'"),
        (LlamaConfig, {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        (LlamaConfig, {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        (LlamaConfig, {"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "auto_map"),
        (LlamaConfig, {"dtype": "float64"}, "float64"),
        (LlamaConfig, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (LlamaConfig, rope(rope_type="linear"), "'linear'"),
        (LlamaConfig, rope(rope_type="yarn"), "'yarn'"),
        (LlamaConfig, rope(rope_type="dynamic"), "'dynamic'"),
        (LlamaConfig, rope(low_freq_factor=2.0), "low_freq_factor"),
        (LlamaConfig, rope(high_freq_factor=8.0), "high_freq_factor"),
        (LlamaConfig, rope(original_max_position_embeddings=4096), "original_max_position_embeddings"),
        (LlamaConfig, rope(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (LlamaConfig, rope(factor=None), "factor None"),
        (LlamaConfig, rope(factor=0.5), "factor 0.5"),
        (LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
        (LlamaConfig, {"per_layer_config": {"1": {"rms_norm_eps": 1e-3}}}, "per_layer_config"),
        (Qwen3Config, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters"),
        (Qwen3MoeConfig, {"attention_bias": True}, "attention_bias"),
        (Qwen3MoeConfig, {**QWEN3_MOE, "num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok 1 "),
        (Qwen3MoeConfig, {**QWEN3_MOE, "num_experts_per_tok": 5}, "num_experts_per_tok 5"),
        (Qwen3MoeConfig, {**QWEN3_MOE, "moe_intermediate_size": 0}, "moe_intermediate_size 0"),
        (Qwen3MoeConfig, {**QWEN3_MOE, "num_experts": 0}, "num_local_experts 0"),
        (Qwen3MoeConfig, {**QWEN3_MOE, "decoder_sparse_step": 0}, "decoder_sparse_step 0"),
        (MixtralConfig, {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1"),
        (MixtralConfig, {"num_experts_per_tok": 1}, "num_experts_per_tok 1 "),
        (MistralConfig, {"sliding_window": 0}, "sliding_window 0"),
        (MistralConfig, {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        (DeepseekV3Config, {**DEEPSEEK_V3, "num_mtp_layers": 1}, "num_nextn_predict_layers 1"),
        (DeepseekV3Config, {**DEEPSEEK_V3, "num_experts_per_tok": 3}, "num_experts_per_tok 3, .* topk_group 2"),
        (DeepseekV3Config, {**DEEPSEEK_V3, "norm_topk_prob": False}, "norm_topk_prob"),
        (DeepseekV3Config, {**DEEPSEEK_V3, "scoring_func": "softmax"}, "scoring_func 'softmax', expected 'sigmoid'"),
        (DeepseekV3Config, {**DEEPSEEK_V3, "topk_method": "greedy"}, "topk_method 'greedy'"),
        (DeepseekV3Config, {**DEEPSEEK_V3, "moe_layer_freq": 2}, "moe_layer_freq 2"),
        (Qwen2Config, {"use_mrope": True}, "use_mrope"),
        (
            Qwen3MoeConfig,
            {**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "max_window_layers 1",
        ),
        (DeepseekV3Config, {**DEEPSEEK_V3, "topk_group": None}, "topk_group is null"),
        (DeepseekV3Config, {**DEEPSEEK_V3, "kv_lora_rank": 0}, "kv_lora_rank 0"),
        (DeepseekV3Config, {**DEEPSEEK_V3, "rope_interleave": False}, "rope_interleave"),
        (DeepseekV3Config, {**DEEPSEEK_V3, "rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05"),
        (DeepseekV3Config, {**DEEPSEEK_V3, "num_key_value_heads": 4}, "num_key_value_heads 4, expected 8"),
        (DeepseekV3Config, {**DEEPSEEK_V3, "rope_parameters": {**YARN, "attention_factor": 2.0}}, "attention_factor"),
        (DeepseekV3Config, {**DEEPSEEK_V3, "rope_parameters": {**YARN, "mscale_all_dim": 0}}, "mscale_all_dim 0"),
        (DeepseekV3Config, {**DEEPSEEK_V3, **rope()}, "'llama3'"),
        (
            DeepseekV3Config,  # transformers' one weight is 1, Megatron's a sigmoid
            {**DEEPSEEK_V3, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1},
            "num_experts_per_tok 1 ",
        ),
        (DeepseekV3Config, {**DEEPSEEK_V3, "routed_scaling_factor": 0.0}, "routed_scaling_factor 0.0"),
        (GemmaConfig, {}, "'gemma': .* root of the width"),
        (Gemma2Config, {}, "'gemma2': .*softcapping"),
        (Gemma3TextConfig, {}, "'gemma3_text': .*two rope bases"),
        (Qwen2MoeConfig, {}, "Qwen3MoeForCausalLM"),  # the message lists what is known
    ],
)
def test_refusals(config_class: type, changes: dict[str, Any], message: str) -> None:
    config = config_class(**{**SIZES, **changes})
    with pytest.raises(ValueError, match=message) as raised:
        ModelShape.from_hf(config)
    assert "\n" not in str(raised.value)


def test_yarn_as_deepseek_released_it() -> None:
    """With `type`, and in `rope_scaling`."""
    scaling = {key: value for key, value in YARN.items() if key not in ("rope_type", "rope_theta")}
    config = DeepseekV3Config(rope_scaling={**scaling, "type": "yarn"}, rope_theta=10000, **DEEPSEEK_V3)
    assert dict(ModelShape.from_hf(config).mla.yarn) == scaling


def test_unused_sliding_window_is_accepted() -> None:
    """Released Qwen2.5 configurations name a window and do not use it."""
    config = Qwen2Config(use_sliding_window=False, sliding_window=64, max_window_layers=1, **SIZES)
    assert ModelShape.from_hf(config).num_layers == 3


def test_sliding_window() -> None:
    assert ModelShape.from_hf(CONFIGS["mistral"]()).sliding_window is None
    assert ModelShape.from_hf(CONFIGS["mistral-window"]()).sliding_window == 9
    assert ModelShape.from_hf(MistralConfig(sliding_window=256, **SIZES)).sliding_window is None  # all positions


def test_experts() -> None:
    assert ModelShape.from_hf(CONFIGS_WITH_EXPERTS["mixtral"]()).moe == MoeShape(
        num_experts=4, ffn_hidden_size=80, router_topk=2, router_pre_softmax=False, layers=(True, True, True)
    )
    moe = ModelShape.from_hf(CONFIGS_WITH_EXPERTS["qwen3-moe-unequal"]()).moe
    assert moe == MoeShape(
        num_experts=4, ffn_hidden_size=48, router_topk=2, router_pre_softmax=True, layers=(False, True, False)
    )
    config = Qwen3MoeConfig(mlp_only_layers=[0, 2], norm_topk_prob=True, **QWEN3_MOE, **SIZES)
    moe = ModelShape.from_hf(config).moe
    assert (moe.layers, moe.router_pre_softmax) == ((False, True, False), False)
    assert ModelShape.from_hf(Qwen3MoeConfig(mlp_only_layers=[0, 1, 2], **QWEN3_MOE, **SIZES)).moe is None


def test_expert_parallel_sizes() -> None:
    shape = ModelShape.from_hf(CONFIGS_WITH_EXPERTS["mixtral"]())  # 4 experts of width 80, 4 key-value heads
    shape.check_tensor_parallel_size(4)
    shape.check_expert_parallel_size(4)
    shape.check_expert_tensor_parallel_size(5)
    for check, size, flag in (
        (shape.check_expert_parallel_size, 3, r"--expert-model-parallel-size 3 .*experts 4; allowed: \[1, 2, 4\]"),
        (shape.check_expert_tensor_parallel_size, 3, "--expert-tensor-parallel-size 3 .*width 80; allowed"),
        (ModelShape.from_hf(CONFIGS["qwen2"]()).check_expert_parallel_size, 2, "--expert-model-parallel-size 2.*none"),
    ):
        with pytest.raises(ValueError, match=flag.replace("none", "no experts")):
            check(size)
    moe_layers_only = ModelShape.from_hf(MixtralConfig(**{**SIZES, "intermediate_size": 81}))
    moe_layers_only.check_tensor_parallel_size(2)  # no MLP is divided by it


def test_tensor_parallel_sizes() -> None:
    shape = ModelShape.from_hf(CONFIGS["qwen2"]())  # 4 key-value heads, MLP width 80
    for tp_size in (1, 2, 4):
        shape.check_tensor_parallel_size(tp_size)
    for tp_size in (0, 3, 5, 8, 16):
        with pytest.raises(ValueError, match=rf"--tensor-model-parallel-size {tp_size} .*allowed: \[1, 2, 4\]"):
            shape.check_tensor_parallel_size(tp_size)
