"""Qwen 2 and 2.5: biases in front of the attention."""

from __future__ import annotations

from gft_megatron.convert.families.tables import DECODER, QKV_BIAS, SWIGLU, Family

QWEN2 = Family("qwen2", "Qwen2ForCausalLM", (*DECODER, *SWIGLU, *QKV_BIAS), add_qkv_bias=True)
