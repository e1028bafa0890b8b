"""Tiny random models of every family, as transformers itself saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SIZES = {
    "vocab_size": 131,  # prime: every padding is real padding
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS = {
    "qwen2-tied": lambda: Qwen2Config(tie_word_embeddings=True, rope_theta=1e6, **SIZES),
    "qwen2": lambda: Qwen2Config(tie_word_embeddings=False, **SIZES),
    "qwen3-tied": lambda: Qwen3Config(head_dim=16, tie_word_embeddings=True, **SIZES),
    "qwen3": lambda: Qwen3Config(head_dim=16, tie_word_embeddings=False, **SIZES),
    "llama2": lambda: LlamaConfig(tie_word_embeddings=False, **{**SIZES, "num_key_value_heads": 8}),
    "llama3-tied": lambda: LlamaConfig(
        tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE, **{**SIZES, "max_position_embeddings": 131072}
    ),
    "mistral": lambda: MistralConfig(tie_word_embeddings=False, sliding_window=None, **SIZES),
    "mistral-window": lambda: MistralConfig(tie_word_embeddings=False, sliding_window=9, **SIZES),
}
QWEN3_MOE = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
DEEPSEEK_V3 = {
    **SIZES,
    "num_key_value_heads": 8,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
}
CONFIGS_WITH_EXPERTS = {
    # The attention of a MoE model is that of a dense one; what is new in it:
    "mixtral": lambda: MixtralConfig(num_local_experts=4, tie_word_embeddings=False, **SIZES),
    "qwen3-moe-tied": lambda: Qwen3MoeConfig(norm_topk_prob=True, tie_word_embeddings=True, **QWEN3_MOE, **SIZES),
    # Experts in the second layer (and the fourth), weights that sum to less than 1.
    "qwen3-moe-unequal": lambda: Qwen3MoeConfig(norm_topk_prob=False, decoder_sparse_step=2, **QWEN3_MOE, **SIZES),
    "deepseek-v3": lambda: DeepseekV3Config(q_lora_rank=16, rope_parameters=YARN, **DEEPSEEK_V3),
    "deepseek-v3-uncompressed": lambda: DeepseekV3Config(
        q_lora_rank=None,
        n_group=1,
        topk_group=1,
        **{key: value for key, value in DEEPSEEK_V3.items() if key not in ("n_group", "topk_group")},
    ),
}


def save_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """Every tensor random, the norms and biases too, so that no two of them can be mistaken for each other."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
        elif "mlp.gate.weight" in name:  # some routers of transformers begin at 0, where every expert ties
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if "e_score" in name:  # float32 in every folder that transformers has loaded and saved
            buffer.data = torch.nn.init.normal_(buffer.float(), std=0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder
