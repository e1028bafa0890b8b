"""Candidates that take logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench.candidates import COPY, LOGIT_STD, OURS, TORCH, Candidate, Result, dense_answer, sampled_rows, where_it_runs
from bench.settings import BenchLoss
from torch import Tensor

from gft_megatron import ops


class _ModelOutput(torch.autograd.Function):
    """Makes logits what a model returns: no leaf, so that an operator may overwrite them."""

    @staticmethod
    def forward(ctx, parameter: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()


class LogitsProblem:
    """Logits [n, v/p] and labels [n] of the whole vocabulary."""

    def __init__(self, settings: BenchLoss, dtype: torch.dtype, tp_group: dist.ProcessGroup) -> None:
        self.rank, self.size = tp_group.rank(), tp_group.size()
        self.tp_group = tp_group
        self.settings = settings
        n, width = settings.num_tokens, settings.vocab_size // self.size
        device = torch.device(settings.device)
        generator = torch.Generator(device).manual_seed(self.rank)
        self.logits = torch.empty(n, width, dtype=dtype, device=device)
        for rows in self.logits.split(64):  # in pieces: fp32 noise of the whole would be twice the size of bf16 logits
            rows.copy_(torch.randn(rows.shape, generator=generator, device=device) * LOGIT_STD)
        labels = torch.randint(settings.vocab_size, (n,), generator=torch.Generator().manual_seed(99))
        self.labels = labels.to(device)
        self.upstream = torch.full((n,), 1.0 / n, device=device)
        self.work = torch.empty_like(self.logits)
        self.parameter = torch.zeros((), device=device, requires_grad=True)
        self.floor_bytes = 3 * self.logits.nbytes

    def fresh(self) -> tuple[Tensor, ...]:
        self.work.copy_(self.logits)
        return (_ModelOutput.apply(self.parameter, self.work),)

    def expected(self, with_entropy: bool) -> tuple[Tensor, Result]:
        rows = sampled_rows(torch.arange(len(self.labels), device=self.labels.device))
        shard = self.logits[rows].float()
        shards = [torch.empty_like(shard) for _ in range(self.size)]
        dist.all_gather(shards, shard, group=self.tp_group)
        answer = dense_answer(torch.cat(shards, dim=-1).double(), self.labels[rows], with_entropy)
        width = shard.shape[-1]
        return rows, Result(answer.loss, answer.grad[:, self.rank * width : (self.rank + 1) * width])

    def candidates(self) -> Iterator[Candidate | str]:
        yield Candidate(COPY, self._copy, floor=1.5)
        if self.size == 1:
            yield Candidate(TORCH, self._per_token(lambda x, y: F.cross_entropy(x, y, reduction="none")))
            yield Candidate("torch log_softmax + gather", self._per_token(_log_softmax_and_gather))
        else:
            yield f"{TORCH}, torch log_softmax + gather: need the whole vocabulary on one rank"
        yield from self._megatron()
        yield from self._gpu_libraries()
        yield Candidate("ours", self._ours(inplace=False), ours=True)
        yield Candidate(OURS, self._ours(inplace=True), ours=True)
        if self.settings.entropy:
            run = self._ours(inplace=True, with_entropy=True)
            yield Candidate(f"{OURS} + entropy", run, with_entropy=True, ours=True)
        if self.size > 1:
            yield "ours one sweep: needs the whole vocabulary on one rank"
        elif hasattr(ops, "rectified_cross_entropy"):
            yield Candidate("ours one sweep", self._ours_one_sweep, ours=True)

    def _copy(self, logits: Tensor) -> None:
        self.work.copy_(self.logits)

    def _per_token(self, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Result]:
        def run(logits: Tensor) -> Result:
            loss = loss_of(logits, self.labels)
            (grad,) = torch.autograd.grad(loss, logits, self.upstream.to(loss.dtype))
            return Result(loss.detach(), grad)

        return run

    def _sequence_first(self, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Result]:
        """For operators that take [sequence, batch, v/p]."""
        return self._per_token(lambda x, y: loss_of(x[:, None], y[:, None])[:, 0])

    def _megatron(self) -> Iterator[Candidate | str]:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

        yield Candidate("Megatron vocab_parallel_cross_entropy", self._sequence_first(vocab_parallel_cross_entropy))
        fused = functools.partial(_call_with_group, fused_vocab_parallel_cross_entropy, self.tp_group)
        yield Candidate("Megatron fused_vocab_parallel_cross_entropy", self._sequence_first(fused))

    def _gpu_libraries(self) -> Iterator[Candidate | str]:
        for name, build in (
            ("Liger vocab-parallel cross entropy", self._liger),
            ("Transformer Engine parallel_cross_entropy", self._transformer_engine),
        ):
            yield where_it_runs(name, self.settings.device, build)

    def _liger(self) -> Callable[[Tensor], Result]:
        from liger_kernel.transformers import LigerVocabParallelCrossEntropy

        return self._sequence_first(
            functools.partial(_call_with_group, LigerVocabParallelCrossEntropy(), self.tp_group)
        )

    def _transformer_engine(self) -> Callable[[Tensor], Result]:
        from transformer_engine.pytorch import parallel_cross_entropy

        group = self.tp_group if self.size > 1 else None
        return self._sequence_first(lambda x, y: parallel_cross_entropy(x, y, 0.0, False, group))

    def _ours(self, *, inplace: bool, with_entropy: bool = False) -> Callable[[Tensor], Result]:
        def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
            log_probs, entropy = ops.vocab_parallel_log_probs(
                logits, labels, tp_group=self.tp_group, with_entropy=with_entropy, inplace_backward=inplace
            )
            return -log_probs - entropy if with_entropy else -log_probs

        return self._per_token(loss_of)

    def _ours_one_sweep(self, logits: Tensor) -> Result:
        loss, log_probs = ops.rectified_cross_entropy(logits, self.labels, self.upstream, 0.0)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        return Result(-log_probs.detach(), grad)


def _log_softmax_and_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def _call_with_group(loss_of: Callable, tp_group: dist.ProcessGroup, logits: Tensor, labels: Tensor) -> Tensor:
    return loss_of(logits, labels, tp_group)
