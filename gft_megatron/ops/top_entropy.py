"""Entropy of the likeliest tokens of a vocabulary-parallel softmax, without a gradient: EAFT's measure of doubt.

Every shard gives its largest logits; one all-gather of them, and the largest of all are the largest of the vocabulary.

Shapes: n tokens, v vocabulary, p tensor-parallel size. Dots stand for any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from gft_megatron.ops.gather import start_gather
from gft_megatron.ops.rows import vocab_slice


@torch.no_grad()
def vocab_parallel_top_entropy(
    logits: Tensor,  # [..., v/p] fp32, bf16 or fp16
    *,
    top_k: int,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:  # [...] fp32
    """-sum_j p_j log p_j in nats over the `top_k` largest logits / temperature, p their softmax (they sum to 1).

    Every rank of `tp_group` holds an equal slice of the vocabulary, in rank order, and gets the same bits. A vocabulary
    of fewer tokens is taken whole.

    Args:
        vocab_size: the true size where the vocabulary is padded.

    Raises:
        ValueError: top_k is below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it has to be at least 1")
    width = logits.shape[-1]
    _, valid, vocab = vocab_slice(width, vocab_size, tp_group)
    rows = logits.reshape(-1, width)
    largest = torch.full((len(rows), min(top_k, width)), -torch.inf, device=logits.device)
    if valid:
        count = min(top_k, valid)
        largest[:, :count] = rows[:, :valid].topk(count, dim=-1).values.float()
    gathered = start_gather(largest, tp_group)()  # [p, n, k]
    of_all = gathered.transpose(0, 1).flatten(1).topk(min(top_k, vocab), dim=-1).values / temperature
    log_probs = of_all.log_softmax(-1)
    return torch.special.entr(log_probs.exp()).sum(-1).view(logits.shape[:-1])
