"""Per-token log-probability and entropy of vocabulary-parallel logits, differentiable.

One pass over the logits forward, one all-gather of 16 bytes a token, one pass backward without communication. Nothing
of the logits' size is kept besides the logits themselves, and with `inplace_backward` nothing is allocated either.

Shapes: n tokens, v vocabulary, p tensor-parallel size. Dots stand for any leading dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from gft_megatron.ops.library import row_ops

IGNORED = -1
"""What the operators take as the label of an ignored row (any negative one does)."""


def vocab_parallel_log_probs(
    logits: Tensor,  # [..., v/p] fp32, bf16 or fp16
    labels: Tensor,  # [...] int64, ids of the whole vocabulary
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    inplace_backward: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # [...] fp32, [...] fp32 or None
    """log softmax(logits / temperature) at each label, and the entropy of that distribution.

    Every rank of `tp_group` holds an equal slice of the vocabulary, in rank order; None means that `logits` holds the
    whole of it. All ranks get the same bits, and each the gradient of its own slice.

    Args:
        with_entropy: also return the entropy (nats), differentiable; it costs no further pass.
        inplace_backward: write the gradient over the logits. They are then gone: an operation that saved them raises in
            its backward, and a second backward through here raises too.
        ignore_index: rows with this label give log-prob 0, entropy 0 and no gradient; their logits are not read.
        vocab_size: the true size where the vocabulary is padded; columns beyond it count as absent, gradient 0.

    Raises:
        ValueError: arguments of the wrong shape, dtype or range. A label outside the vocabulary raises on CPU; on CUDA,
            where looking would make the host wait, it stops the process by a device-side assertion, as in
            torch.nn.functional.cross_entropy.
        RuntimeError: CUDA logits without the CUDA operators; in backward, the second use of overwritten logits.
    """
    _check_arguments(logits, labels, temperature)
    rank, size = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
    width = logits.shape[-1]
    vocab = width * size if vocab_size is None else vocab_size
    if not 1 <= vocab <= width * size:
        raise ValueError(f"vocab_size must be in [1, {width * size}] ({size} shards of {width} columns), got {vocab}")
    if logits.stride(-1) != 1 and width > 1:
        if inplace_backward:
            raise ValueError(f"inplace_backward needs adjacent logits of a token, got strides {logits.stride()}")
        logits = logits.contiguous()
    shard = _Shard(
        vocab_start=rank * width,
        valid_vocab=min(max(vocab - rank * width, 0), width),
        inv_temperature=1.0 / temperature,
        tp_group=tp_group if size > 1 else None,
    )
    rows = _row_labels(labels, ignore_index, vocab)
    log_probs, entropy = _LogProbs.apply(logits, rows, shard, with_entropy, inplace_backward)
    return log_probs.view(labels.shape), entropy.view(labels.shape) if with_entropy else None


@dataclass(frozen=True)
class _Shard:
    """This rank's slice of the vocabulary."""

    vocab_start: int
    valid_vocab: int
    inv_temperature: float
    tp_group: dist.ProcessGroup | None  # None: the only shard


def _check_arguments(logits: Tensor, labels: Tensor, temperature: float) -> None:
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits must be float32, bfloat16 or float16, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., vocabulary / tensor-parallel size], got {tuple(logits.shape)}")
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:-1] or labels.device != logits.device:
        raise ValueError(
            f"labels must be int64 {tuple(logits.shape[:-1])} on {logits.device}, "
            f"got {labels.dtype} {tuple(labels.shape)} on {labels.device}"
        )
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _row_labels(labels: Tensor, ignore_index: int, vocab: int) -> Tensor:  # [...] -> [n]
    """Labels as the operators want them, after a look at their range."""
    ignored = labels == ignore_index
    in_range = ignored | ((labels >= 0) & (labels < vocab))
    if labels.device.type == "cpu":
        if not in_range.all():
            raise ValueError(f"label {int(labels[~in_range][0])} is outside the vocabulary [0, {vocab})")
    else:
        torch._assert_async(in_range.all(), f"a label is outside the vocabulary [0, {vocab})")
    return labels.masked_fill(ignored, IGNORED).reshape(-1)


def _row_blocks(logits: Tensor) -> list[Tensor]:
    """Matrices [n_i, v/p] over the same memory that together hold every row, in order: one, unless the strides of the
    leading dimensions cannot be merged (`logits[:, :-1]`, a transposed [s, b, v/p])."""
    try:
        return [logits.view(-1, logits.shape[-1])]
    except RuntimeError:
        return [block for part in logits.unbind(0) for block in _row_blocks(part)]


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: Tensor, labels: Tensor, shard: _Shard, with_entropy: bool, inplace_backward: bool
    ) -> tuple[Tensor, Tensor | None]:
        ops = row_ops(logits.device)
        blocks = _row_blocks(logits)
        place = (shard.vocab_start, shard.valid_vocab, shard.inv_temperature)
        stats = [
            ops.row_stats(block, rows, *place, with_entropy)
            for block, rows in zip(blocks, labels.split([len(block) for block in blocks]), strict=True)
        ]
        log_prob, entropy, maximum, log_sum = ops.combine_stats(_gather(torch.cat(stats), shard.tp_group))
        ctx.save_for_backward(logits, labels, maximum, log_sum, entropy)
        ctx.place = place
        ctx.inplace_backward = inplace_backward
        ctx.overwritten = False
        ctx.set_materialize_grads(False)
        return log_prob, entropy if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_log_prob: Tensor | None, grad_entropy: Tensor | None) -> tuple:
        if ctx.overwritten:
            raise RuntimeError(
                "the logits of vocab_parallel_log_probs(inplace_backward=True) were overwritten by their gradient in "
                "the first backward; a second one needs inplace_backward=False"
            )
        if grad_log_prob is None and grad_entropy is None:
            return None, None, None, None, None
        logits, labels, maximum, log_sum, entropy = ctx.saved_tensors
        logits = logits.detach()
        if grad_log_prob is None:
            grad_log_prob = torch.zeros_like(maximum)
        blocks = _row_blocks(logits)
        sizes = [len(block) for block in blocks]
        if ctx.inplace_backward:
            grad, grad_blocks = logits, blocks
        else:
            grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
            grad_blocks = grad.view(-1, logits.shape[-1]).split(sizes)
        vectors = (maximum, log_sum, entropy, grad_log_prob, grad_entropy)
        pieces = [[None] * len(sizes) if vector is None else vector.split(sizes) for vector in vectors]
        ops = row_ops(logits.device)
        for block, grad_block, rows, *piece in zip(blocks, grad_blocks, labels.split(sizes), *pieces, strict=True):
            ops.row_grad_(block, grad_block, rows, *ctx.place, *piece)
        if ctx.inplace_backward:
            ctx.overwritten = True
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None, None


def _gather(stats: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:  # [n, 4] -> [p, n, 4]
    if tp_group is None:
        return stats[None]
    size = dist.get_world_size(tp_group)
    gathered = stats.new_empty((size * stats.shape[0], 4))
    dist.all_gather_into_tensor(gathered, stats, group=tp_group)
    return gathered.view(size, -1, 4)
