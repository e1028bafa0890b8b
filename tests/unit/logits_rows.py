"""Rows of logits, labels and upstream gradients that the tests of the CPU and of the emulated operators share."""

from __future__ import annotations

import torch
from torch import Tensor


def make_rows(n: int, vocab: int, dtype: torch.dtype, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Logits [n, vocab] and labels [n]."""
    generator = torch.Generator().manual_seed(n * 1_000_003 + vocab)
    logits = torch.randn(n, vocab, generator=generator) * scale
    return logits.to(dtype), torch.randint(vocab, (n,), generator=generator)


def upstream(n: int) -> tuple[Tensor, Tensor]:
    """dL/dlog_prob [n] and dL/dentropy [n]."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(n, generator=generator), torch.randn(n, generator=generator)
