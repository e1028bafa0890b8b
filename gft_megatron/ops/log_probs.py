"""Per-token log-probability and entropy of vocabulary-parallel logits, differentiable.

One pass over the logits forward, one all-gather of 16 bytes a token, one pass backward without communication. Nothing
of the logits' size is kept besides the logits themselves, and with `inplace_backward` nothing is allocated either.

For torch.compile all of it is one operator, `gft_megatron::log_probs`, and its backward another; the collective runs
inside the first, which finds the process group by its name, as torch's functional collectives do.

Shapes: n tokens, v vocabulary, p tensor-parallel size. Dots stand for any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed.distributed_c10d import _resolve_process_group

from gft_megatron.ops.gather import start_gather
from gft_megatron.ops.library import row_ops
from gft_megatron.ops.rows import (
    check_arguments,
    row_blocks,
    row_labels,
    saved_through_hooks,
    shares_rows,
    vocab_slice,
)


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
            its backward, and a second backward through here raises too. Under torch.compile, and where saved tensors
            pass through hooks (torch.utils.checkpoint with use_reentrant=False, offloading), the gradient is a new
            tensor all the same: nobody could tell who else reads the logits.
        ignore_index: rows with this label give log-prob 0, entropy 0 and no gradient; their logits are not read.
        vocab_size: the true size where the vocabulary is padded; columns beyond it count as absent, gradient 0.

    Raises:
        ValueError: arguments of the wrong shape, dtype or range. A label outside the vocabulary raises on CPU; on CUDA,
            where looking would make the host wait, it stops the process by a device-side assertion, as in
            torch.nn.functional.cross_entropy; under torch.compile it is a RuntimeError on CPU.
        RuntimeError: CUDA logits without the CUDA operators; in backward, the second use of overwritten logits.
    """
    check_arguments(logits, labels, temperature)
    vocab_start, valid_vocab, vocab = vocab_slice(logits.shape[-1], vocab_size, tp_group)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        if inplace_backward:
            raise ValueError(f"inplace_backward needs adjacent logits of a token, got strides {logits.stride()}")
        logits = logits.contiguous()
    compiling = torch.compiler.is_compiling()
    if inplace_backward and not compiling and shares_rows(logits):
        raise ValueError(f"inplace_backward needs a row of memory for every token, got strides {logits.stride()}")
    log_probs, entropy, _, _ = (torch.ops.gft_megatron.log_probs if compiling else _LogProbs.apply)(
        logits,
        row_labels(labels, ignore_index, vocab),
        vocab_start,
        valid_vocab,
        1.0 / temperature,
        with_entropy,
        "" if tp_group is None or dist.get_world_size(tp_group) == 1 else tp_group.group_name,
        inplace_backward and not compiling,
    )
    return log_probs.view(labels.shape), entropy.view(labels.shape) if with_entropy else None


def _log_probs(
    logits: Tensor,  # [..., v/p]
    labels: Tensor,  # [n]
    vocab_start: int,
    valid_vocab: int,
    inv_temperature: float,
    want_entropy: bool,
    tp_group: str,
    inplace_backward: bool,  # read by the backward
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ops = row_ops(logits.device)
    blocks = row_blocks(logits)
    stats = [
        ops.row_stats(block, rows, vocab_start, valid_vocab, inv_temperature, want_entropy)
        for block, rows in zip(blocks, labels.split([len(block) for block in blocks]), strict=True)
    ]
    return ops.combine_stats(_gather(stats[0] if len(stats) == 1 else torch.cat(stats), tp_group))


def _gather(stats: Tensor, tp_group: str) -> Tensor:  # [n, 4] -> [p, n, 4]
    return start_gather(stats, _resolve_process_group(tp_group) if tp_group else None)()


def _fake_log_probs(logits: Tensor, labels: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_prob, entropy, maximum, log_sum = (logits.new_empty(labels.shape, dtype=torch.float32) for _ in range(4))
    return log_prob, entropy, maximum, log_sum


def _log_probs_grad(logits: Tensor, labels: Tensor, *rest: object) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_grad(logits, grad, labels, *rest)
    return grad


def _fake_log_probs_grad(logits: Tensor, labels: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _write_grad(
    logits: Tensor,  # [..., v/p]
    grad: Tensor,  # logits itself, or contiguous
    labels: Tensor,  # [n]
    vocab_start: int,
    valid_vocab: int,
    inv_temperature: float,
    *vectors: Tensor | None,  # [n]: max, log_sum, entropy, grad_log_prob, grad_entropy
) -> None:
    ops = row_ops(logits.device)
    blocks = row_blocks(logits)
    sizes = [len(block) for block in blocks]
    grad_blocks = blocks if grad is logits else grad.view(-1, logits.shape[-1]).split(sizes)
    pieces = [[None] * len(sizes) if vector is None else vector.split(sizes) for vector in vectors]
    for block, grad_block, rows, *piece in zip(blocks, grad_blocks, labels.split(sizes), *pieces, strict=True):
        ops.row_grad_(block, grad_block, rows, vocab_start, valid_vocab, inv_temperature, *piece)


def _save_for_backward(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    logits, labels, vocab_start, valid_vocab, inv_temperature, _, _, inplace_backward = inputs
    _, entropy, maximum, log_sum = output
    ctx.save_for_backward(logits, labels, maximum, log_sum, entropy)
    ctx.place = (vocab_start, valid_vocab, inv_temperature)
    ctx.inplace_backward = inplace_backward and not saved_through_hooks()
    ctx.overwritten = False
    ctx.mark_non_differentiable(maximum, log_sum)
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: FunctionCtx, grad_log_prob: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple:
    if ctx.overwritten:
        raise RuntimeError(
            "the logits of vocab_parallel_log_probs(inplace_backward=True) were overwritten by their gradient in "
            "the first backward; a second one needs inplace_backward=False"
        )
    nothing = (None,) * 7
    if grad_log_prob is None and grad_entropy is None:
        return None, *nothing
    logits, labels, maximum, log_sum, entropy = ctx.saved_tensors
    if grad_log_prob is None:
        grad_log_prob = torch.zeros_like(maximum)
    arguments = (labels, *ctx.place, maximum, log_sum, entropy, grad_log_prob, grad_entropy)
    if not ctx.inplace_backward:
        return torch.ops.gft_megatron.log_probs_grad(logits, *arguments), *nothing
    grad = logits.detach()
    _write_grad(grad, grad, *arguments)
    ctx.overwritten = True
    torch.autograd.graph.increment_version(grad)
    return grad, *nothing


class _LogProbs(torch.autograd.Function):
    """The operator without the dispatcher, whose way through Python (20 us) is longer than a small call."""

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _log_probs(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


_LIBRARY = torch.library.Library("gft_megatron", "FRAGMENT")
# tp_group: a name, "" where this is the only shard -> four [n] fp32
_LIBRARY.define(
    "log_probs(Tensor logits, Tensor labels, SymInt vocab_start, SymInt valid_vocab, float inv_temperature, "
    "bool want_entropy, str tp_group, bool inplace_backward) "
    "-> (Tensor log_prob, Tensor entropy, Tensor max, Tensor log_sum)"
)
# -> dL/dlogits, contiguous
_LIBRARY.define(
    "log_probs_grad(Tensor logits, Tensor labels, SymInt vocab_start, SymInt valid_vocab, float inv_temperature, "
    "Tensor max, Tensor log_sum, Tensor entropy, Tensor grad_log_prob, Tensor? grad_entropy) -> Tensor"
)
_LIBRARY.impl("log_probs", _log_probs, "CompositeExplicitAutograd")
_LIBRARY.impl("log_probs_grad", _log_probs_grad, "CompositeExplicitAutograd")
torch.library.register_fake("gft_megatron::log_probs", _fake_log_probs)
torch.library.register_fake("gft_megatron::log_probs_grad", _fake_log_probs_grad)
torch.library.register_autograd("gft_megatron::log_probs", _backward, setup_context=_save_for_backward)
