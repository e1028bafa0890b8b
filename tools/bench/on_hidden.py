"""Candidates that take hidden states and the weight of the output layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench.candidates import (
    GEMMS,
    LINEAR,
    LOGIT_STD,
    TORCH_LINEAR,
    Candidate,
    Result,
    dense_answer,
    sampled_rows,
    where_it_runs,
)
from bench.settings import BenchLoss
from torch import Tensor

from gft_megatron import ops


class LinearProblem:
    """Hidden states [n, h], weight [v, h], labels [n], and labels of which a share is ignored."""

    floor_bytes = None

    def __init__(self, settings: BenchLoss, dtype: torch.dtype, tp_group: dist.ProcessGroup) -> None:
        self.settings = settings
        n, vocab, width = settings.num_tokens, settings.vocab_size, settings.hidden_size
        device = torch.device(settings.device)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(n, width, generator=generator)
        weight = torch.randn(vocab, width, generator=generator).mul_(LOGIT_STD / width**0.5)
        self.hidden, self.weight = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
        self.labels = torch.randint(vocab, (n,), generator=generator).to(device)
        ignored = torch.randperm(n, generator=generator)[: round(settings.ignored_share * n)]
        self.some_labels = self.labels.index_fill(0, ignored.to(device), -100)
        self.upstream = torch.full((n,), 1.0 / n, device=device)

    def fresh(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight

    def expected(self, with_entropy: bool) -> tuple[Tensor, Result]:
        rows = sampled_rows((self.some_labels != -100).nonzero()[:, 0])
        hidden, pieces = self.hidden.detach()[rows].double(), self.weight.detach().split(8192)
        answer = dense_answer(
            torch.cat([hidden @ w.double().t() for w in pieces], dim=-1), self.labels[rows], with_entropy
        )
        grads = answer.grad.split(8192, dim=-1)
        return rows, Result(answer.loss, sum(g @ w.double() for g, w in zip(grads, pieces, strict=True)))

    def candidates(self) -> Iterator[Candidate | str]:
        yield Candidate(GEMMS, _three_gemms, floor=1.0)
        yield Candidate(TORCH_LINEAR, self._per_token(_torch_linear, self.labels))
        yield where_it_runs("Liger fused linear cross entropy", self.settings.device, self._liger)
        yield Candidate("logits + ours in place", self._per_token(_logits_and_ours, self.labels), ours=True)
        yield from self._ours("", self.labels, 1.0)
        share = self.settings.ignored_share
        if share:
            yield from self._ours(f", {share:.0%} ignored", self.some_labels, 1.0 - share)

    def _ours(self, ending: str, labels: Tensor, work: float) -> Iterator[Candidate]:
        if hasattr(ops, "linear_log_probs"):
            run = self._per_token(_linear_log_probs, labels)
            yield Candidate(LINEAR + ending, run, work=work, ours=True)
            if self.settings.entropy:
                run = self._per_token(_linear_log_probs_and_entropy, labels)
                yield Candidate(f"{LINEAR} + entropy{ending}", run, with_entropy=True, work=work, ours=True)
        if hasattr(ops, "linear_loss"):
            run = functools.partial(self._linear_loss, labels)
            yield Candidate(f"linear_loss{ending}", run, work=work, ours=True)

    def _per_token(
        self, loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], labels: Tensor
    ) -> Callable[[Tensor, Tensor], Result]:
        def run(hidden: Tensor, weight: Tensor) -> Result:
            loss = loss_of(hidden, weight, labels)
            grad, _ = torch.autograd.grad(loss, (hidden, weight), self.upstream)
            return Result(loss.detach(), grad)

        return run

    def _linear_loss(self, labels: Tensor, hidden: Tensor, weight: Tensor) -> Result:
        def token_loss(log_probs: Tensor, entropy: Tensor | None, rows: Tensor) -> Tensor:
            return -log_probs * self.upstream[rows]

        loss, log_probs, _ = ops.linear_loss(hidden, weight, labels, token_loss)
        grad, _ = torch.autograd.grad(loss, (hidden, weight))
        return Result(-log_probs, grad)

    def _liger(self) -> Callable[[Tensor, Tensor], Result]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        mean_loss = LigerFusedLinearCrossEntropyLoss()

        def run(hidden: Tensor, weight: Tensor) -> Result:
            grad, _ = torch.autograd.grad(mean_loss(weight, hidden, self.labels), (hidden, weight))
            return Result(None, grad)

        return run


def _three_gemms(hidden: Tensor, weight: Tensor) -> None:
    with torch.no_grad():
        logits = hidden @ weight.t()
        logits @ weight, logits.t() @ hidden


def _torch_linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")


def _logits_and_ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -ops.vocab_parallel_log_probs(hidden @ weight.t(), labels, inplace_backward=True)[0]


def _linear_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -ops.linear_log_probs(hidden, weight, labels)[0]


def _linear_log_probs_and_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    log_probs, entropy = ops.linear_log_probs(hidden, weight, labels, with_entropy=True)
    return -log_probs - entropy
