"""Mends for Megatron-Core's mixture of experts where Transformer Engine, or a GPU, is missing.

megatron-core 0.16.1 to 0.19.2, both in transformer/moe/moe_utils.py (lines of 0.16.1); nothing changes where
Transformer Engine and CUDA are.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils, token_dispatcher


def mend_moe_without_transformer_engine() -> None:
    """Idempotent."""
    # RouterGatingLinearFunction (:1192) asks whether this is None, but its import has failed, so there is no name.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # maybe_move_tensor_to_cpu (:1093) makes lists of numbers, which gloo's all-to-all wants, only of CUDA tensors.
    if not torch.cuda.is_available():
        token_dispatcher.maybe_move_tensor_to_cpu = _on_the_cpu_already


def _on_the_cpu_already(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
