"""Llama 2 and 3."""

from __future__ import annotations

from gft_megatron.convert.families.tables import DECODER, SWIGLU, Family

LLAMA = Family("llama", "LlamaForCausalLM", (*DECODER, *SWIGLU))
