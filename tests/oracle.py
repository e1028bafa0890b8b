"""The dense float64 answer that every implementation of the operators is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """log p of the labels, entropy, and the gradient of sum(grad_log_probs * log_probs + grad_entropy * entropy)."""

    log_probs: Tensor  # [n] fp64
    entropy: Tensor  # [n] fp64
    grad: Tensor  # [n, v] fp64


def dense_answer(
    logits: Tensor,  # [n, v]
    labels: Tensor,  # [n], -100: ignored
    grad_log_probs: Tensor,  # [n]
    grad_entropy: Tensor,  # [n]
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Dense:
    """Autograd through log_softmax in float64, on the rows that count and the columns that exist."""
    live = labels != -100
    x = logits[live, :vocab_size].double().requires_grad_()
    log_p = (x / temperature).log_softmax(-1)
    chosen = log_p.gather(-1, labels[live, None])[:, 0]
    # p log p is 0 at p = 0; the inner where keeps -inf out of the gradient.
    entropy = -(log_p.exp() * torch.where(log_p.isneginf(), 0.0, log_p)).sum(-1)
    (chosen * grad_log_probs[live].double() + entropy * grad_entropy[live].double()).sum().backward()

    log_probs, entropies = torch.zeros(2, len(labels), dtype=torch.float64, device=logits.device)
    log_probs[live], entropies[live] = chosen.detach(), entropy.detach()
    grad = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    columns = torch.arange(x.shape[-1], device=logits.device)
    grad[live.nonzero(), columns] = x.grad
    return Dense(log_probs, entropies, grad)


def assert_grad_close(grad: Tensor, expected: Tensor) -> None:
    """Equal up to fp32 arithmetic and one rounding to the gradient's dtype, element by element."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    smallest = torch.finfo(grad.dtype).smallest_normal * torch.finfo(grad.dtype).eps
    rtol = {torch.float32: 5e-6}.get(grad.dtype, torch.finfo(grad.dtype).eps * 0.51)
    torch.testing.assert_close(grad.double(), expected, rtol=rtol, atol=3e-7 * (1.0 + scale) + smallest)


def assert_promised_grad(
    grad: Tensor,  # [n, v]
    expected: Tensor,  # [n, v] fp64
    logits: Tensor,  # [n, v]
    labels: Tensor,  # [n]
    grad_log_probs: Tensor,  # [n]
    grad_entropy: Tensor,  # [n]
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> None:
    """Within 5e-6 of what is added up to an element, and of 1 where the label's probability is subtracted from it; then
    one rounding to the gradient's dtype. So the gradient of a token of probability 1e-12 is still a good one. (From
    1e-18 on it is less so: log p is rounded twice, each time by 2^-24 of itself.)

    1 / temperature has to be exact in fp32: its rounding is not the operators' error."""
    vocab = logits.shape[1] if vocab_size is None else vocab_size
    log_p = (logits[:, :vocab].double() / temperature).log_softmax(-1)
    p = log_p.exp()
    surprise = torch.where(p > 0, -log_p, 0.0)
    entropy = (p * surprise).sum(-1, keepdim=True)
    size = p * (grad_log_probs.abs()[:, None] + grad_entropy.abs()[:, None] * (surprise + entropy))
    size *= (surprise * 2**-23 / 5e-6).clamp(min=1.0)
    live = labels >= 0
    size[live, labels[live]] += grad_log_probs[live].abs()
    size = torch.nn.functional.pad(size, (0, logits.shape[1] - vocab)) / temperature
    info = torch.finfo(grad.dtype)
    rounding = 0.0 if grad.dtype == torch.float32 else info.eps / 2
    allowed = 5e-6 * size + rounding * expected.abs() * (1 + 1e-3) + max(info.smallest_normal * info.eps, 2e-38)
    wrong = ~((grad.double() - expected).abs() <= allowed) & live[:, None]  # NaN is not within anything
    assert not wrong.any(), f"{int(wrong.sum())} elements, the first at {wrong.nonzero()[0].tolist()}"
    assert not grad[~live].any() and not grad[:, vocab:].any()


@dataclass(frozen=True)
class DenseKl:
    """KL(reference || policy), the gradient of sum(grad_kl * KL), and what is added up to it in absolute value."""

    kl: Tensor  # [n] fp64
    grad: Tensor  # [n, v] fp64
    size: Tensor  # [n, v] fp64: (p + q) |grad_kl| / temperature, more where log p is rounded to more than 5e-6


def dense_kl(
    logits: Tensor,  # [n, v]
    ref_logits: Tensor,  # [n, v]
    grad_kl: Tensor,  # [n]
    *,
    labels: Tensor | None = None,  # [n], -100: ignored
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> DenseKl:
    """Autograd through log_softmax in float64, on the rows that count and the columns that exist."""
    live = torch.ones(len(logits), dtype=torch.bool) if labels is None else labels != -100
    x = logits[live, :vocab_size].double().requires_grad_()
    log_p = (x / temperature).log_softmax(-1)
    log_q = (ref_logits[live, :vocab_size].double() / temperature).log_softmax(-1)
    q = log_q.exp()
    value = torch.where(q == 0, 0.0, q * (log_q - log_p)).sum(-1)
    value.backward(grad_kl[live].double())
    scale = grad_kl[live, None].abs().double() / temperature
    size = sum(log.exp() * (log.clamp(min=-800) * -(2**-22) / 5e-6).clamp(min=1.0) for log in (log_p.detach(), log_q))
    dense = DenseKl(*(torch.zeros(shape, dtype=torch.float64) for shape in (len(logits), logits.shape, logits.shape)))
    dense.kl[live] = value.detach()
    columns = torch.arange(x.shape[-1])
    dense.grad[live.nonzero(), columns] = x.grad
    dense.size[live.nonzero(), columns] = size * scale
    return dense


def assert_kl_grad_close(grad: Tensor, expected: Tensor, size: Tensor) -> None:
    """Within 5e-6 of the probabilities that are subtracted, then one rounding to the gradient's dtype."""
    info = torch.finfo(grad.dtype)
    rounding = 0.0 if grad.dtype == torch.float32 else info.eps / 2
    smallest = max(info.smallest_normal * info.eps, 1e-36)  # the operators flush exp() below 1e-38 to 0
    allowed = 5e-6 * size + rounding * expected.abs() * (1 + 1e-3) + smallest
    wrong = ~((grad.double() - expected).abs() <= allowed)  # NaN is not within anything
    assert not wrong.any(), f"{int(wrong.sum())} elements, the first at {wrong.nonzero()[0].tolist()}"
