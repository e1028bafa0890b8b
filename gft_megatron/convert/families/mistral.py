"""Mistral: Llama's tensors; the first release attends to a window."""

from __future__ import annotations

from gft_megatron.convert.families.tables import DECODER, SWIGLU, Family

MISTRAL = Family("mistral", "MistralForCausalLM", (*DECODER, *SWIGLU), has_sliding_window=True)
