"""Per-token KL(reference || policy) over the whole of a vocabulary-parallel softmax, differentiable in the policy.

One pass over both logits forward, one all-gather of 40 bytes a token, one pass backward without communication. Nothing
of the logits' size is kept besides the two inputs, and the vocabulary is never gathered.

For torch.compile it is one operator, `gft_megatron::kl`, and its backward another, as in log_probs.py.

With q the reference, y its and x the policy's scaled logits, and every sum relative to the row's own maximum,
    KL = sum_j q_j ((y_j - max y) - (x_j - max x)) + log sum exp(x - max x) - log sum exp(y - max y)
so logits near 1e4 lose nothing, and equal logits give exactly 0: the same operations on the same numbers.

Shapes: n tokens, v vocabulary, p tensor-parallel size. Dots stand for any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed.distributed_c10d import _resolve_process_group

from gft_megatron.ops import reference
from gft_megatron.ops.gather import start_gather
from gft_megatron.ops.library import row_ops
from gft_megatron.ops.rows import check_arguments, row_labels, vocab_slice


def vocab_parallel_kl(
    logits: Tensor,  # [..., v/p] fp32, bf16 or fp16
    ref_logits: Tensor,  # [..., v/p], the dtype of logits
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    labels: Tensor | None = None,  # [...] int64, ids of the whole vocabulary
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> Tensor:  # [...] fp32
    """sum_j q_j (log q_j - log p_j) in nats, q = softmax(ref_logits / temperature), p = softmax(logits / temperature).

    The gradient in `logits` is (p_j - q_j) / temperature times the upstream one; `ref_logits` is a constant and gets
    none. It is the anchor of ASFT and the loss of distillation. Every rank of `tp_group` holds an equal slice of the
    vocabulary, in rank order; None means that both tensors hold the whole of it. All ranks get the same bits, and each
    the gradient of its own slice.

    Where p_j is 0 (a logit of -inf) and q_j is not, the result is inf, and its gradient still p_j - q_j. A q_j of 0
    contributes 0; so may one below 1e-37 of the row's largest. NaN and +inf in either tensor give NaN.

    On CUDA it is plain PyTorch in float64, a block of rows at a time: memory is bounded, speed is not the point.

    Args:
        labels: only says which rows are ignored; None: no row is.
        ignore_index: rows with this label give 0 and no gradient, whatever their logits are.
        vocab_size: the true size where the vocabulary is padded; columns beyond it count as absent, gradient 0.

    Raises:
        ValueError: arguments of the wrong shape, dtype or range. A label outside the vocabulary is refused as by
            vocab_parallel_log_probs.
    """
    if ref_logits.shape != logits.shape or ref_logits.dtype != logits.dtype or ref_logits.device != logits.device:
        raise ValueError(
            f"ref_logits must be as logits, {logits.dtype} {tuple(logits.shape)} on {logits.device}, "
            f"got {ref_logits.dtype} {tuple(ref_logits.shape)} on {ref_logits.device}"
        )
    if labels is None:
        labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    check_arguments(logits, labels, temperature)
    _, valid_vocab, vocab = vocab_slice(logits.shape[-1], vocab_size, tp_group)
    kl, _, _, _, _ = (torch.ops.gft_megatron.kl if torch.compiler.is_compiling() else _Kl.apply)(
        logits,
        ref_logits.detach(),
        row_labels(labels, ignore_index, vocab),
        valid_vocab,
        1.0 / temperature,
        "" if tp_group is None or dist.get_world_size(tp_group) == 1 else tp_group.group_name,
    )
    return kl.view(labels.shape)


def _ops(device: torch.device) -> Any:
    return row_ops(device) if device.type == "cpu" else reference


def _row_blocks(logits: Tensor, ref_logits: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs of matrices [n_i, v/p] over the same memory that together hold every row: rows.row_blocks of two."""
    try:
        return [(logits.view(-1, logits.shape[-1]), ref_logits.view(-1, logits.shape[-1]))]
    except RuntimeError:
        pairs = zip(logits.unbind(0), ref_logits.unbind(0), strict=True)
        return [block for pair in pairs for block in _row_blocks(*pair)]


def _adjacent(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _kl(
    logits: Tensor,  # [..., v/p]
    ref_logits: Tensor,  # [..., v/p]
    labels: Tensor,  # [n]
    valid_vocab: int,
    inv_temperature: float,
    tp_group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ops = _ops(logits.device)
    blocks = _row_blocks(_adjacent(logits), _adjacent(ref_logits))
    stats = [
        ops.kl_stats(*block, rows, valid_vocab, inv_temperature)
        for block, rows in zip(blocks, labels.split([len(block) for block, _ in blocks]), strict=True)
    ]
    group = _resolve_process_group(tp_group) if tp_group else None
    return _combine(start_gather(stats[0] if len(stats) == 1 else torch.cat(stats), group)())


def _combine(stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shards [p, n, 5] fp64, in rank order -> KL, then max and log_sum of the policy and of the reference, [n] fp32."""
    maxima, sums, ref_maxima, ref_sums, weighted = stats.unbind(-1)  # [p, n]
    maximum, delta = _to_largest(maxima)
    ref_maximum, ref_delta = _to_largest(ref_maxima)
    scale = torch.where(sums == 0, 0.0, delta.exp())
    ref_scale = torch.where(ref_sums == 0, 0.0, ref_delta.exp())
    # 0 * inf: where a shard is nothing beside the others, it does not matter that the policy excludes it.
    moved = torch.where(ref_scale == 0, 0.0, ref_scale * (weighted + ref_sums * (ref_delta - delta)))
    total, ref_total = (sums * scale).sum(0), (ref_sums * ref_scale).sum(0)
    log_sum, ref_log_sum = total.log(), ref_total.log()
    kl = (moved.sum(0) / ref_total + log_sum - ref_log_sum).clamp(min=0)  # rounding
    return kl.float(), maximum.float(), log_sum.float(), ref_maximum.float(), ref_log_sum.float()


def _to_largest(maxima: Tensor) -> tuple[Tensor, Tensor]:  # [p, n] -> the shift of the row [n], of each shard [p, n]
    finite = torch.where(maxima.isneginf(), 0.0, maxima)
    largest = maxima.amax(0)
    largest = torch.where(largest.isneginf(), 0.0, largest)
    return largest, finite - largest


def _fake_kl(logits: Tensor, ref_logits: Tensor, labels: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty(labels.shape, dtype=torch.float32) for _ in range(5))


def _kl_grad(
    logits: Tensor,  # [..., v/p]
    ref_logits: Tensor,  # [..., v/p]
    labels: Tensor,  # [n]
    valid_vocab: int,
    inv_temperature: float,
    *vectors: Tensor,  # [n]: max, log_sum, ref_max, ref_log_sum, grad_kl
) -> Tensor:
    ops = _ops(logits.device)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    blocks = _row_blocks(_adjacent(logits), _adjacent(ref_logits))
    sizes = [len(block) for block, _ in blocks]
    pieces = [vector.split(sizes) for vector in (labels, *vectors)]
    for block, grad_block, rows, *piece in zip(
        blocks, grad.view(-1, grad.shape[-1]).split(sizes), *pieces, strict=True
    ):
        ops.kl_grad_(*block, grad_block, rows, valid_vocab, inv_temperature, *piece)
    return grad


def _fake_kl_grad(logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    logits, ref_logits, labels, valid_vocab, inv_temperature, _ = inputs
    _, *vectors = output
    ctx.save_for_backward(logits, ref_logits, labels, *vectors)
    ctx.place = (valid_vocab, inv_temperature)
    ctx.mark_non_differentiable(*vectors)
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: FunctionCtx, grad_kl: Tensor | None, *_: None) -> tuple:
    nothing = (None,) * 5
    if grad_kl is None:
        return None, *nothing
    logits, ref_logits, labels, *vectors = ctx.saved_tensors
    grad = torch.ops.gft_megatron.kl_grad(logits, ref_logits, labels, *ctx.place, *vectors, grad_kl)
    return grad, *nothing


class _Kl(torch.autograd.Function):
    """The operator without the dispatcher, as in log_probs.py."""

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: object) -> tuple[Tensor, ...]:
        output = _kl(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


_LIBRARY = torch.library.Library("gft_megatron", "FRAGMENT")
# tp_group: a name, "" where this is the only shard -> five [n] fp32
_LIBRARY.define(
    "kl(Tensor logits, Tensor ref_logits, Tensor labels, SymInt valid_vocab, float inv_temperature, str tp_group) "
    "-> (Tensor kl, Tensor max, Tensor log_sum, Tensor ref_max, Tensor ref_log_sum)"
)
# -> dL/dlogits, contiguous
_LIBRARY.define(
    "kl_grad(Tensor logits, Tensor ref_logits, Tensor labels, SymInt valid_vocab, float inv_temperature, "
    "Tensor max, Tensor log_sum, Tensor ref_max, Tensor ref_log_sum, Tensor grad_kl) -> Tensor"
)
_LIBRARY.impl("kl", _kl, "CompositeExplicitAutograd")
_LIBRARY.impl("kl_grad", _kl_grad, "CompositeExplicitAutograd")
torch.library.register_fake("gft_megatron::kl", _fake_kl)
torch.library.register_fake("gft_megatron::kl_grad", _fake_kl_grad)
torch.library.register_autograd("gft_megatron::kl", _backward, setup_context=_save_for_backward)
