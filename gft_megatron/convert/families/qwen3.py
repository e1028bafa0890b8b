"""Qwen 3: norms of queries and keys, no biases."""

from __future__ import annotations

from gft_megatron.convert.families.tables import DECODER, QK_NORMS, SWIGLU, Family

QWEN3 = Family("qwen3", "Qwen3ForCausalLM", (*DECODER, *SWIGLU, *QK_NORMS), qk_layernorm=True)
