"""A token-local loss straight from hidden states with its gradient formed in the forward pass: three matrix products.

Tokens go through in chunks with whole rows of logits: logits, their statistics, the loss of these tokens, the gradient
over the logits, and the two products that need it, before the next chunk takes their place. Under tensor parallelism
the statistics of a chunk travel while the next chunk's logits are computed. Which operator to use when: see linear.py.

Shapes: as in linear.py; m tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    live_hidden,
    live_tokens,
    main_grad_of,
    spans,
    start_hidden_reduction,
    vocab_shard,
    without_autocast,
)

CHUNK_TOKENS = 1024
"""Each chunk reads and writes the weight's fp32 gradient once; with fewer rows that takes longer than the product."""

TokenLoss = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""(log_probs [m], entropy [m] or None, positions [m] in the flattened labels) -> loss [m]."""


def linear_loss(
    hidden: Tensor,  # [..., H] fp32, bf16 or fp16; [s/p, ..., H] with sequence_parallel
    weight: Tensor,  # [v/p, H], same dtype
    labels: Tensor,  # [...] int64, ids of the whole vocabulary; [s, ...] with sequence_parallel
    token_loss: TokenLoss,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    temperature: float = 1.0,
    with_entropy: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:  # [] fp32, [...] fp32, [...] fp32 or None
    """Sum of `token_loss` over the tokens that are not ignored, and (detached) their log-probs and entropy.

    Arguments and ranks as in `linear_log_probs`. A token's loss may depend on that token's numbers and on constants
    only: `token_loss` is called chunk after chunk (once with no tokens if all are ignored), on all ranks alike.

    Where the weight has an fp32 `main_grad` (Megatron's DDP) and gradients are on, its gradient times `grad_scale` is
    added there BY THIS CALL, and no memory of the weight's size is used. Backward then hands out the gradient of
    `hidden`, and has to be called with `grad_scale` itself. Do not put such a call into a checkpointed region: it would
    run twice. Without `main_grad` the gradient is kept in fp32 until backward, which may have any scale.

    Args:
        token_loss: differentiable in log_probs and entropy.
        chunk_tokens: rows of logits in memory (default 1024); twice that under tensor parallelism.
        grad_scale: the gradient that backward will be called with (the loss scale of fp16 training).

    Raises:
        ValueError: arguments or the result of `token_loss` of the wrong shape, dtype or range; labels as in
            `linear_log_probs`; in backward, another upstream gradient than `grad_scale` where `main_grad` already holds
            the products with that one (on CUDA a device-side assertion).
        RuntimeError: CUDA tensors without the CUDA operators; a second backward.
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
    is_on = torch.is_grad_enabled()
    plan = _Plan(
        token_loss=token_loss,
        chunk_tokens=chunk_tokens or CHUNK_TOKENS,
        grad_scale=grad_scale,
        needs_hidden=is_on and hidden.requires_grad,
        needs_weight=is_on and weight.requires_grad,
    )
    loss, log_probs, entropy = _LinearLoss.apply(hidden, weight, tokens, shard, plan)
    return loss, log_probs.view(labels.shape), entropy.view(labels.shape) if with_entropy else None


@dataclass(frozen=True)
class _Plan:
    token_loss: TokenLoss
    chunk_tokens: int
    grad_scale: float
    needs_hidden: bool
    needs_weight: bool

    @property
    def needs_any(self) -> bool:
        return self.needs_hidden or self.needs_weight


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, tokens: LiveTokens, shard: VocabShard, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        main_grad = main_grad_of(weight) if plan.needs_weight else None
        with without_autocast(hidden):
            pass_ = _Pass(live_hidden(hidden, tokens, shard), weight, tokens, shard, plan, main_grad)
            pass_.run()
        ctx.grad_hidden = pass_.reduced_grad_hidden().view(hidden.shape) if plan.needs_hidden else None
        ctx.grad_weight, ctx.weight_dtype = pass_.grad_weight, weight.dtype
        ctx.is_in_main_grad = main_grad is not None
        ctx.grad_scale, ctx.is_spent = plan.grad_scale, False
        ctx.mark_non_differentiable(pass_.log_probs, pass_.entropy)
        return pass_.loss, pass_.log_probs, pass_.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_loss: Tensor, *_: Tensor) -> tuple:
        if ctx.is_spent:
            raise RuntimeError(
                "linear_loss hands out the gradient that it formed in forward once; for a second backward call it "
                "again, or use linear_log_probs"
            )
        ctx.is_spent = True
        grad_hidden, grad_weight = ctx.grad_hidden, ctx.grad_weight
        ctx.grad_hidden = ctx.grad_weight = None
        if ctx.is_in_main_grad:
            _require_scale(grad_loss, ctx.grad_scale)
            return grad_hidden, None, None, None, None
        factor = grad_loss / ctx.grad_scale
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(factor)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(factor).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _require_scale(grad_loss: Tensor, grad_scale: float) -> None:
    is_as_announced = (grad_loss == torch.full_like(grad_loss, grad_scale)).all()  # both rounded to fp32
    if grad_loss.is_cuda:  # looking would make the host wait
        torch._assert_async(is_as_announced, "linear_loss: backward was called with another scale than grad_scale")
    elif not is_as_announced:
        raise ValueError(
            f"backward of linear_loss was called with {float(grad_loss)}, but main_grad already holds the weight's "
            f"gradient times grad_scale={grad_scale}; give linear_loss the scale that backward will have"
        )


class _Pass:
    """One run over the chunks, and what it leaves."""

    def __init__(
        self,
        hidden: Tensor,  # [n, H]
        weight: Tensor,
        tokens: LiveTokens,
        shard: VocabShard,
        plan: _Plan,
        main_grad: Tensor | None,
    ) -> None:
        self._hidden, self._weight = hidden, weight[: shard.num_columns]
        self._tokens, self._shard, self._plan = tokens, shard, plan
        self._ops = row_ops(hidden.device)
        self._finish_hidden: Callable[[], Tensor] | None = None
        # Not empty_like: of hidden states in another order of memory it would be one that NCCL does not send.
        self._grad_hidden = hidden.new_empty(hidden.shape) if plan.needs_hidden else None
        self.grad_weight: Tensor | None = None
        if plan.needs_weight and main_grad is None:
            self.grad_weight = torch.zeros(weight.shape, device=weight.device)
        self._weight_sum = self.grad_weight if main_grad is None else main_grad
        self.loss = torch.zeros((), device=hidden.device)
        self.log_probs = torch.zeros(tokens.num_all, device=hidden.device)
        self.entropy = torch.zeros(tokens.num_all, device=hidden.device)

    def run(self) -> None:
        chunks = list(spans(len(self._hidden), self._plan.chunk_tokens)) or [slice(0, 0)]
        # While the statistics of a chunk travel, its logits have to stay.
        depth = 1 if self._shard.tp_group is None else 2
        rows = min(self._plan.chunk_tokens, len(self._hidden))
        buffers = [LogitsBuffer(self._hidden, rows, len(self._weight)) for _ in range(min(depth, len(chunks)))]
        waiting: list[Callable[[], None]] = []
        for index, rows in enumerate(chunks):
            waiting.append(self._start(rows, buffers[index % depth], is_last=index == len(chunks) - 1))
            if len(waiting) == depth:
                waiting.pop(0)()
        for finish in waiting:
            finish()

    def reduced_grad_hidden(self) -> Tensor:  # [t, H], [t/p, H] with sequence parallelism
        return self._finish_hidden()

    def _start(self, rows: slice, buffer: LogitsBuffer, *, is_last: bool) -> Callable[[], None]:
        logits = buffer.product(self._hidden[rows], self._weight)
        place = self._shard.statistics_arguments(0, len(self._weight))
        arrived = start_gather(self._ops.row_stats(logits, self._tokens.labels[rows], *place), self._shard.tp_group)
        return lambda: self._finish(rows, logits, arrived(), is_last)

    def _finish(self, rows: slice, logits: Tensor, stats: Tensor, is_last: bool) -> None:
        positions, labels = self._tokens.positions[rows], self._tokens.labels[rows]
        log_prob, entropy, maximum, log_sum = self._ops.combine_stats(stats)
        grad_log_prob, grad_entropy = self._token_gradients(log_prob, entropy, positions)
        if not self._plan.needs_any:
            return
        place = self._shard.gradient_arguments(0, len(self._weight))
        self._ops.row_grad_(logits, logits, labels, *place, maximum, log_sum, entropy, grad_log_prob, grad_entropy)
        if self._grad_hidden is not None:
            torch.mm(logits, self._weight, out=self._grad_hidden[rows])
            if is_last:  # the sum over the ranks travels during the product below
                self._finish_hidden = start_hidden_reduction(self._grad_hidden, self._tokens, self._shard)
        if self._weight_sum is not None:
            add_product(self._weight_sum[: len(self._weight)], logits.t(), self._hidden[rows])

    def _token_gradients(
        self, log_prob: Tensor, entropy: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor | None]:  # [m], [m]
        """Call the loss, book its value, and return its gradient in log-prob and entropy, times grad_scale."""
        self.log_probs.index_copy_(0, positions, log_prob)
        leaves = [log_prob.detach().requires_grad_(self._plan.needs_any)]
        if self._shard.with_entropy:
            self.entropy.index_copy_(0, positions, entropy)
            leaves.append(entropy.detach().requires_grad_(self._plan.needs_any))
        with torch.set_grad_enabled(self._plan.needs_any):
            losses = self._plan.token_loss(leaves[0], leaves[1] if len(leaves) > 1 else None, positions)
            if losses.shape != positions.shape:
                raise ValueError(
                    f"token_loss must return one loss a token, {tuple(positions.shape)}, got {losses.shape}"
                )
            total = losses.float().sum()
        self.loss += total.detach()
        if not total.requires_grad:
            return torch.zeros_like(log_prob), None
        grads = torch.autograd.grad(
            total, leaves, total.new_tensor(self._plan.grad_scale), allow_unused=True, materialize_grads=True
        )
        return grads[0], grads[1] if len(leaves) > 1 else None
