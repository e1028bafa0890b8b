"""Cross-entropy with rectified coefficients in one sweep over the logits: SFT, DFT and GFT without tensor parallelism.

Where one rank holds whole rows, and the weight of a token is known in advance or follows from its own probability, the
gradient can be written in the forward pass, while a row is still in the cache: a bfloat16 logit is read and written
once (4 bytes) instead of read twice and written once (6).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from gft_megatron.ops.library import row_ops
from gft_megatron.ops.log_probs import vocab_parallel_log_probs
from gft_megatron.ops.rows import (
    check_arguments,
    may_look,
    row_blocks,
    row_labels,
    saved_through_hooks,
    shares_rows,
    vocab_slice,
)


def rectified_cross_entropy(
    logits: Tensor,  # [..., v] fp32, bf16 or fp16
    labels: Tensor,  # [...] int64
    weights: Tensor,  # [...] floating
    tau: float | Tensor,  # float, or [...] floating
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # [...] fp32, [...] fp32
    """-weight * c * log p of each label, c = p below tau and 1 from tau on (a constant), and log p.

    weights of 1 give cross-entropy (SFT) with tau = 0 and DFT with tau = 2; advantages as weights give GFT. Only the
    loss is differentiable, and only in the logits.

    Where a gradient is wanted, THE LOGITS ARE OVERWRITTEN BY IT in this call: read nothing from them afterwards; an
    operation that saved them raises in its backward. The gradient is a new tensor under torch.compile, where saved
    tensors pass through hooks (torch.utils.checkpoint with use_reentrant=False, offloading), and for expanded logits.

    Args:
        weights: every factor of a token's loss: advantage, mask, normalization. Rows of weight 0 give loss 0.
        temperature: the logits are divided by it.
        ignore_index: rows with this label give loss 0, log-prob 0 and no gradient; their logits are not read.
        vocab_size: the true size where the vocabulary is padded; columns beyond it count as absent, gradient 0.
        grad_scale: the upstream gradient that each loss is going to get: `(loss.sum() * grad_scale).backward()`. It is
            already in the gradient that is written here, and backward only checks it.

    Raises:
        ValueError: arguments of the wrong shape, dtype or range, or wanting a gradient themselves. On CPU also a label
            outside the vocabulary, and in backward another upstream gradient than grad_scale; on CUDA, where looking
            would make the host wait, these stop the process by a device-side assertion; under torch.compile they are a
            RuntimeError on CPU.
        RuntimeError: CUDA logits without the CUDA operators; a second backward.
    """
    check_arguments(logits, labels, temperature)
    _, _, vocab = vocab_slice(logits.shape[-1], vocab_size, None)
    weight = _row_values("weights", weights, labels)
    limit = _row_values("tau", tau if isinstance(tau, Tensor) else torch.full_like(weight, tau).view_as(labels), labels)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        log_probs, _ = vocab_parallel_log_probs(
            logits, labels, temperature=temperature, ignore_index=ignore_index, vocab_size=vocab
        )
        loss = _loss(log_probs.view(-1), labels.reshape(-1) == ignore_index, weight, limit)
        return loss.view(labels.shape), log_probs
    rows = row_labels(labels, ignore_index, vocab)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    rectified = torch.ops.gft_megatron.rectified if torch.compiler.is_compiling() else _Rectified.apply
    loss, log_probs, _ = rectified(logits, rows, vocab, 1.0 / temperature, weight, limit, grad_scale)
    return loss.view(labels.shape), log_probs.view(labels.shape)


def _row_values(name: str, values: Tensor, labels: Tensor) -> Tensor:  # [...] -> [n] fp32
    if values.shape != labels.shape or values.device != labels.device or not values.is_floating_point():
        raise ValueError(
            f"{name} must be floating {tuple(labels.shape)} on {labels.device}, "
            f"got {values.dtype} {tuple(values.shape)} on {values.device}"
        )
    if values.requires_grad:
        raise ValueError(f"{name} must be a constant, but wants a gradient: detach it")
    return values.float().reshape(-1)


def _loss(log_prob: Tensor, ignored: Tensor, weight: Tensor, tau: Tensor) -> Tensor:  # all [n]
    prob = log_prob.exp()
    loss = -weight * torch.where(prob < tau, prob, 1.0) * log_prob
    return loss.masked_fill(ignored | (weight == 0), 0.0)


def _sweep(
    logits: Tensor,  # [..., v]
    grad: Tensor,  # logits itself, or contiguous
    labels: Tensor,  # [n]
    valid_vocab: int,
    inv_temperature: float,
    weight: Tensor,  # [n]
    tau: Tensor,  # [n]
    grad_scale: float,
) -> tuple[Tensor, Tensor]:  # loss, log_prob
    ops = row_ops(logits.device)
    blocks = row_blocks(logits)
    sizes = [len(block) for block in blocks]
    grad_blocks = blocks if grad is logits else grad.view(-1, logits.shape[-1]).split(sizes)
    pieces = (vector.split(sizes) for vector in (labels, weight * grad_scale, tau))
    log_probs = [
        ops.rectified_sweep_(block, grad_block, rows, valid_vocab, inv_temperature, factor, limit)
        for block, grad_block, rows, factor, limit in zip(blocks, grad_blocks, *pieces, strict=True)
    ]
    log_prob = torch.cat(log_probs)
    return _loss(log_prob, labels < 0, weight, tau), log_prob


def _rectified(logits: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return *_sweep(logits, grad, *rest), grad


def _fake_rectified(logits: Tensor, labels: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    loss, log_prob = (logits.new_empty(labels.shape, dtype=torch.float32) for _ in range(2))
    return loss, log_prob, torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, labels, _, _, weight, _, grad_scale = inputs
    _, log_prob, grad = output
    ctx.save_for_backward(labels, weight, grad)
    ctx.grad_scale = grad_scale
    ctx.given_away = False
    ctx.may_look = False  # what differentiates the operator is tracing it
    ctx.mark_non_differentiable(log_prob, grad)
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: FunctionCtx, grad_loss: Tensor | None, *_: None) -> tuple:
    if ctx.given_away:
        raise RuntimeError(
            "the gradient of rectified_cross_entropy was handed on in the first backward; a second one needs "
            "vocab_parallel_log_probs"
        )
    nothing = (None,) * 6
    if grad_loss is None:
        return None, *nothing
    labels, weight, grad = ctx.saved_tensors
    expected = (grad_loss == ctx.grad_scale) | (labels < 0) | (weight == 0)
    message = (
        f"the gradient of rectified_cross_entropy was written for grad_scale={ctx.grad_scale} upstream of every loss, "
        "and got another: put weights and masks of tokens into `weights`, a factor of all into `grad_scale`"
    )
    if not ctx.may_look:
        torch._assert_async(expected.all(), message)
    elif not expected.all():
        raise ValueError(f"{message} (found {float(grad_loss[~expected][0])})")
    ctx.given_away = True
    return grad.detach(), *nothing


class _Rectified(torch.autograd.Function):
    """The operator in place, which one that torch.compile differentiates cannot be."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
        if shares_rows(logits) or saved_through_hooks():
            output = _rectified(logits, *rest)
        else:
            grad = logits.detach()
            output = *_sweep(grad, grad, *rest), grad
            torch.autograd.graph.increment_version(grad)
        _save_for_backward(ctx, (logits, *rest), output)
        ctx.may_look = may_look(logits)
        return output

    backward = staticmethod(_backward)


_LIBRARY = torch.library.Library("gft_megatron", "FRAGMENT")
# -> loss [n] fp32, log_prob [n] fp32, dloss/dlogits * grad_scale, contiguous
_LIBRARY.define(
    "rectified(Tensor logits, Tensor labels, SymInt valid_vocab, float inv_temperature, Tensor weight, Tensor tau, "
    "float grad_scale) -> (Tensor loss, Tensor log_prob, Tensor grad)"
)
_LIBRARY.impl("rectified", _rectified, "CompositeExplicitAutograd")
torch.library.register_fake("gft_megatron::rectified", _fake_rectified)
torch.library.register_autograd("gft_megatron::rectified", _backward, setup_context=_save_for_backward)
