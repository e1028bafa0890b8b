"""Log-probability and entropy of each label straight from hidden states: logits exist one tile at a time.

The vocabulary is cut into tiles whose statistics merge as those of tensor-parallel shards do. Backward computes each
tile again and turns it into its gradient in place: four matrix products instead of three, for any loss on top. Which
operator to use when: see linear.py.

Shapes: as in linear.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from gft_megatron.ops.gather import start_gather
from gft_megatron.ops.library import row_ops
from gft_megatron.ops.linear import (
    LiveTokens,
    LogitsBuffer,
    VocabShard,
    add_product,
    column_spans,
    live_hidden,
    live_tokens,
    main_grad_of,
    spans,
    start_hidden_reduction,
    vocab_shard,
    without_autocast,
)

CHUNK_TOKENS = 4096


def linear_log_probs(
    hidden: Tensor,  # [..., H] fp32, bf16 or fp16; [s/p, ..., H] with sequence_parallel
    weight: Tensor,  # [v/p, H], same dtype
    labels: Tensor,  # [...] int64, ids of the whole vocabulary; [s, ...] with sequence_parallel
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    temperature: float = 1.0,
    with_entropy: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # [...] fp32, [...] fp32 or None
    """`vocab_parallel_log_probs(hidden @ weight.T, labels)` that never holds [tokens, v/p], forward or backward.

    Every rank of `tp_group` holds an equal slice of the weight's rows, in rank order, the same hidden states (with
    `sequence_parallel`: its own slice of their first dimension) and all labels. All ranks get the same bits. The
    gradient of `hidden` comes back summed over the ranks (with `sequence_parallel`: this rank's rows of the sum).

    Where the weight has an fp32 `main_grad` (Megatron's DDP), its gradient is added there and autograd sees none.

    Args:
        with_entropy: also return the entropy (nats), differentiable; no further pass.
        ignore_index: rows with this label give log-prob 0, entropy 0 and no gradient. They are left out of every matrix
            product, so they cost nothing and a NaN in them reaches nothing.
        vocab_size: the true size where the vocabulary is padded; weight rows beyond it are never read, gradient 0.
        chunk_tokens: most rows of a tile (default 4096). Its width follows from 64 MiB of logits, but is at least 1024.

    Raises:
        ValueError: arguments of the wrong shape, dtype or range. A label outside the vocabulary raises on CPU; on CUDA
            it stops the process by a device-side assertion, as in torch.nn.functional.cross_entropy.
        RuntimeError: CUDA tensors without the CUDA operators.
    """
    shard, vocab = vocab_shard(
        hidden,
        weight,
        labels,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
        temperature=temperature,
        with_entropy=with_entropy,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
    )
    tokens = live_tokens(labels, ignore_index, vocab)
    log_probs, entropy = _LinearLogProbs.apply(hidden, weight, tokens, shard, chunk_tokens or CHUNK_TOKENS)
    return log_probs.view(labels.shape), entropy.view(labels.shape) if with_entropy else None


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, tokens: LiveTokens, shard: VocabShard, chunk_tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        with without_autocast(hidden):
            stats = _statistics(live_hidden(hidden, tokens, shard), weight, tokens.labels, shard, chunk_tokens)
        log_prob, entropy, maximum, log_sum = row_ops(hidden.device).combine_stats(
            start_gather(stats, shard.tp_group)()
        )
        ctx.save_for_backward(hidden, weight, maximum, log_sum, entropy)
        ctx.main_grad = main_grad_of(weight)
        ctx.tokens, ctx.shard, ctx.chunk_tokens = tokens, shard, chunk_tokens
        ctx.set_materialize_grads(False)
        return _per_token(log_prob, tokens), _per_token(entropy, tokens) if shard.with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_log_prob: Tensor | None, grad_entropy: Tensor | None) -> tuple:
        if grad_log_prob is None and grad_entropy is None:
            return None, None, None, None, None
        hidden, weight, maximum, log_sum, entropy = ctx.saved_tensors
        tokens, shard = ctx.tokens, ctx.shard
        upstream = [
            None if grad is None else grad[tokens.positions].contiguous() for grad in (grad_log_prob, grad_entropy)
        ]
        if upstream[0] is None:
            upstream[0] = torch.zeros_like(maximum)
        with without_autocast(hidden):
            grad_hidden, grad_weight = _gradients(
                live_hidden(hidden, tokens, shard),
                weight,
                tokens,
                shard,
                ctx.chunk_tokens,
                (maximum, log_sum, entropy, *upstream),
                ctx.needs_input_grad[0],
                ctx.needs_input_grad[1],
                ctx.main_grad,
            )
        return None if grad_hidden is None else grad_hidden.view(hidden.shape), grad_weight, None, None, None


def _per_token(values: Tensor, tokens: LiveTokens) -> Tensor:  # [n] -> [t]
    return values.new_zeros(tokens.num_all).index_copy_(0, tokens.positions, values)


def _statistics(
    hidden: Tensor,  # [n, H]
    weight: Tensor,
    labels: Tensor,  # [n]
    shard: VocabShard,
    chunk_tokens: int,
) -> Tensor:  # [n, 4]
    ops = row_ops(hidden.device)
    chunk = min(chunk_tokens, len(hidden))
    tiles = column_spans(chunk, shard, hidden) or [slice(0, 0)]
    buffer = LogitsBuffer(hidden, chunk, tiles[0].stop)
    stats = torch.empty((len(hidden), 4), device=hidden.device)
    for rows in spans(len(hidden), chunk_tokens):
        by_tile = []
        for columns in tiles:
            logits = buffer.product(hidden[rows], weight[columns])
            place = shard.statistics_arguments(columns.start, columns.stop - columns.start)
            by_tile.append(ops.row_stats(logits, labels[rows], *place))
        stats[rows] = ops.merge_stats(torch.stack(by_tile))
    return stats


def _gradients(
    hidden: Tensor,  # [n, H]
    weight: Tensor,
    tokens: LiveTokens,
    shard: VocabShard,
    chunk_tokens: int,
    vectors: tuple[Tensor | None, ...],  # [n] each: max, log_sum, entropy, dL/dlogp, dL/dentropy
    needs_hidden: bool,
    needs_weight: bool,
    main_grad: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """d hidden [t, H] summed over the ranks, d weight [v/p, H] (None where it went to `main_grad`)."""
    ops = row_ops(hidden.device)
    chunk = min(chunk_tokens, len(hidden))
    tiles = column_spans(chunk, shard, hidden)
    width = tiles[0].stop if tiles else 0
    buffer = LogitsBuffer(hidden, chunk, width)
    grad_hidden = torch.zeros(hidden.shape, device=hidden.device) if needs_hidden else None
    grad_weight = _WeightGradient(weight, main_grad, shard.num_columns, width) if needs_weight else None
    for columns in tiles:
        place = shard.gradient_arguments(columns.start, columns.stop - columns.start)
        tile_sum = None if grad_weight is None else grad_weight.sum_of(columns)
        for rows in spans(len(hidden), chunk_tokens):
            logits = buffer.product(hidden[rows], weight[columns])
            pieces = [None if vector is None else vector[rows] for vector in vectors]
            ops.row_grad_(logits, logits, tokens.labels[rows], *place, *pieces)
            if grad_hidden is not None:
                add_product(grad_hidden[rows], logits, weight[columns])
            if tile_sum is not None:
                add_product(tile_sum, logits.t(), hidden[rows])
        if grad_weight is not None:
            grad_weight.round(columns)
    if grad_hidden is not None:
        grad_hidden = start_hidden_reduction(grad_hidden.to(hidden.dtype), tokens, shard)()
    return grad_hidden, None if grad_weight is None else grad_weight.whole


class _WeightGradient:
    """d weight, tile after tile: products of all chunks are summed in fp32 and rounded once."""

    def __init__(self, weight: Tensor, main_grad: Tensor | None, num_columns: int, width: int) -> None:
        self.whole: Tensor | None = None
        """[v/p, H] in the weight's dtype; None where all goes to `main_grad`."""
        self._sums = main_grad
        if main_grad is None:
            self.whole = torch.empty_like(weight)
            self.whole[num_columns:].zero_()
            is_exact = weight.dtype == torch.float32
            self._sums = self.whole if is_exact else torch.empty((width, weight.shape[1]), device=weight.device)
        self._is_apart = self.whole is not None and self._sums is not self.whole

    def sum_of(self, columns: slice) -> Tensor:  # [w, H] fp32
        """What the products of this tile are to be added to."""
        if self._is_apart:
            return self._sums[: columns.stop - columns.start].zero_()
        return self._sums[columns] if self.whole is None else self._sums[columns].zero_()

    def round(self, columns: slice) -> None:
        if self._is_apart:
            self.whole[columns] = self._sums[: columns.stop - columns.start]
