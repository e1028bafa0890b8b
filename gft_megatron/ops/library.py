"""Loads the compiled extension, refuses one built for another torch, and describes its operators to torch.compile.

The extension registers `torch.ops.gft_megatron.*` when it is imported. GFT_MEGATRON_REFERENCE=1 replaces the
operators by the plain PyTorch of reference.py.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from gft_megatron.ops import reference

_REBUILD = "rebuild it: `pip install --no-deps -e .` in the gft_megatron folder"

try:
    from gft_megatron._C import balanced_partition, build_info
except ImportError as error:
    raise ImportError(
        f"the compiled extension of gft_megatron cannot be loaded under torch {torch.__version__} ({error}); it was "
        f"never built, or built against another torch or Python: {_REBUILD}"
    ) from error

if build_info()["torch"] != torch.__version__:
    raise ImportError(
        f"gft_megatron was built against torch {build_info()['torch']}, but torch {torch.__version__} is running: "
        f"{_REBUILD}"
    )

__all__ = ["balanced_partition", "build_info", "row_ops"]

_HAS_CUDA: bool = build_info()["cuda"]  # a constant: torch.compile cannot look into the extension


def row_ops(device: torch.device) -> Any:
    """What holds the operators (`row_stats`, `combine_stats`, `row_grad_`, ...) for tensors on `device`.

    Raises:
        RuntimeError: a CUDA device, and an extension that was built without the CUDA operators.
    """
    if os.environ.get("GFT_MEGATRON_REFERENCE") == "1":
        return reference
    if device.type == "cuda" and not _HAS_CUDA:
        raise RuntimeError(
            "gft_megatron was built without its CUDA operators (no nvcc, or a CPU torch, when it was built); install "
            f"the CUDA toolkit and {_REBUILD} with GFT_MEGATRON_CUDA=1; or set GFT_MEGATRON_REFERENCE=1 (slow)"
        )
    return torch.ops.gft_megatron


@torch.library.register_fake("gft_megatron::row_stats")
def _row_stats(
    logits: Tensor, labels: Tensor, vocab_start: int, valid_vocab: int, inv_temperature: float, want_entropy: bool
) -> Tensor:
    return logits.new_empty((logits.shape[0], 4), dtype=torch.float32)


@torch.library.register_fake("gft_megatron::merge_stats")
def _merge_stats(stats: Tensor) -> Tensor:
    return stats.new_empty(stats.shape[1:])


@torch.library.register_fake("gft_megatron::combine_stats")
def _combine_stats(stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_prob, entropy, maximum, log_sum = (stats.new_empty(stats.shape[1]) for _ in range(4))
    return log_prob, entropy, maximum, log_sum


@torch.library.register_fake("gft_megatron::row_grad_")
def _row_grad_(
    logits: Tensor,
    grad: Tensor,
    labels: Tensor,
    vocab_start: int,
    valid_vocab: int,
    inv_temperature: float,
    max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_log_prob: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    return None


@torch.library.register_fake("gft_megatron::rectified_sweep_")
def _rectified_sweep_(
    logits: Tensor,
    grad: Tensor,
    labels: Tensor,
    valid_vocab: int,
    inv_temperature: float,
    weight: Tensor,
    tau: Tensor,
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.library.register_fake("gft_megatron::kl_stats")
def _kl_stats(logits: Tensor, ref_logits: Tensor, labels: Tensor, valid_vocab: int, inv_temperature: float) -> Tensor:
    return logits.new_empty((logits.shape[0], 5), dtype=torch.float64)


@torch.library.register_fake("gft_megatron::kl_grad_")
def _kl_grad_(
    logits: Tensor,
    ref_logits: Tensor,
    grad: Tensor,
    labels: Tensor,
    valid_vocab: int,
    inv_temperature: float,
    max: Tensor,
    log_sum: Tensor,
    ref_max: Tensor,
    ref_log_sum: Tensor,
    grad_kl: Tensor,
) -> None:
    return None


@torch.library.register_fake("gft_megatron::segment_sums")
def _segment_sums(values: Tensor, mask: Tensor | None, segment_ids: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    return values.new_empty(num_segments), values.new_empty(num_segments)


@torch.library.register_fake("gft_megatron::group_advantages")
def _group_advantages(rewards: Tensor, group_ids: Tensor, divide_by_deviation: bool, ddof: int, eps: float) -> Tensor:
    return torch.empty_like(rewards, dtype=torch.float32)
