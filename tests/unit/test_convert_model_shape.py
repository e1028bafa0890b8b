"""What is read from a configuration, and what is refused because Megatron would compute something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import CONFIGS, LLAMA3_ROPE, SIZES
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from gft_megatron.convert import ModelShape


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
        (Qwen3MoeConfig, {}, "'qwen3_moe'"),
        (MistralConfig, {}, "'mistral'"),
        (GemmaConfig, {}, "Qwen3ForCausalLM"),  # the message lists what is known
    ],
)
def test_refusals(config_class: type, changes: dict[str, Any], message: str) -> None:
    config = config_class(**{**SIZES, **changes})
    with pytest.raises(ValueError, match=message) as raised:
        ModelShape.from_hf(config)
    assert "\n" not in str(raised.value)


def test_unused_sliding_window_is_accepted() -> None:
    """Released Qwen2.5 configurations name a window and do not use it."""
    config = Qwen2Config(use_sliding_window=False, sliding_window=64, max_window_layers=1, **SIZES)
    assert ModelShape.from_hf(config).num_layers == 3


def test_tensor_parallel_sizes() -> None:
    shape = ModelShape.from_hf(CONFIGS["qwen2"]())  # 4 key-value heads, MLP width 80
    for tp_size in (1, 2, 4):
        shape.check_tensor_parallel_size(tp_size)
    for tp_size in (0, 3, 5, 8, 16):
        with pytest.raises(ValueError, match=rf"--tensor-model-parallel-size {tp_size} .*allowed: \[1, 2, 4\]"):
            shape.check_tensor_parallel_size(tp_size)
