"""Mends for Megatron-Core's experts and latent attention where Transformer Engine, or a GPU, is missing.

megatron-core 0.16.1 to 0.19.2 (lines of 0.16.1); nothing changes where Transformer Engine and CUDA are.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils, token_dispatcher


def mend_moe_without_transformer_engine() -> None:
    """Idempotent."""
    # moe_utils.py, RouterGatingLinearFunction (:1192) asks whether this is None, but there is no such name: its import
    # has failed.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # moe_utils.py, maybe_move_tensor_to_cpu (:1093) makes lists of numbers, which gloo's all-to-all wants, only of CUDA
    # tensors.
    if not torch.cuda.is_available():
        token_dispatcher.maybe_move_tensor_to_cpu = _on_the_cpu_already


def mend_mla_without_transformer_engine(linear: type) -> None:
    """Idempotent.

    Args:
        linear: to be accepted for the projections to latents.
    """
    # multi_latent_attention.py (:185) takes its classes for there, because the file that has none of them imports.
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False
        multi_latent_attention.Linear = linear  # otherwise ModelOpt's, which imports with Transformer Engine only


def _on_the_cpu_already(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
