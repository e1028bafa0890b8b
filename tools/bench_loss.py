"""Measure loss operators side by side: forward + backward of the mean negative log-likelihood, in one run.

python tools/bench_loss.py --device cpu --dtype bf16 --vocab-size 151936 --num-tokens 432 --entropy --json out.json
python tools/bench_loss.py --device cuda --dtype bf16 --num-tokens 8192 --tensor-parallel 1 2 --markdown table.md
python tools/bench_loss.py --linear --hidden-size 896 --num-tokens 2048 --dtype bf16 --ignored-share 0.75

The candidates take turns, and the smallest time of all rounds counts. Each finds fresh logits, which no time is taken
for. The fields of a row:

seconds: wall clock, or the GPU's own clock; with tensor parallelism until the last rank is done.

cpu_seconds: user + system time of all threads of a process, the mean of the ranks. null on a GPU.

gb_per_s: the least bytes (read, read again, write: 3 times the logits of a rank) / seconds; `copy` moves 2 times them.

floor_share: the time that the least bytes take at the speed of `copy` / the time. With --linear, the time of the three
bare matrix products (its share, where tokens are ignored) / the time. In CPU-seconds on a CPU.

peak_extra_bytes: the most memory held at one time beyond what was held before, of the rank with the most.

collectives: started on the tensor-parallel group by one forward + backward.

max_abs_error: of the per-token loss and of the gradient of its sum, against float64, on 8 rows spread over all.
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import functools
import json
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gft_megatron import ops
from gft_megatron.command_line import parse_flags

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLED_ROWS = 8
LOGIT_STD = 3.0

COPY, GEMMS = "copy", "three bare GEMMs"
TORCH, OURS = "torch cross_entropy", "ours in place"
TORCH_LINEAR, LINEAR = "torch linear + cross_entropy", "linear_log_probs"


@dataclass(frozen=True, kw_only=True)
class BenchLoss:
    """What to measure."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    dtype: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16")
    """Data types of the logits, one table section each."""
    vocab_size: int = 151_936
    """Columns of the logits, all ranks together."""
    num_tokens: int = 432
    """Rows of the logits."""
    tensor_parallel: tuple[int, ...] = (1,)
    """Numbers of ranks that the vocabulary is split over."""
    entropy: bool = False
    """Also measure ours with a differentiable entropy."""
    linear: bool = False
    """Measure the output layer and the loss together."""
    hidden_size: int = 896
    """Width of the hidden states, for --linear."""
    ignored_share: float = 0.0
    """Share of ignored tokens in further rows of --linear."""
    threads: int = 1
    """CPU threads of each rank."""
    repeats: int = 7
    """Rounds."""
    json: Path | None = None
    """File for the rows."""
    markdown: Path | None = None
    """File for the table."""
    picture: Path | None = None
    """File for a picture of the table (.png or .svg)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_tokens", "hidden_size", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for size in self.tensor_parallel:
            if size < 1 or self.vocab_size % size:
                raise ValueError(f"--vocab-size {self.vocab_size} cannot be split over --tensor-parallel {size}")
            if self.device == "cuda" and size > torch.cuda.device_count():
                raise ValueError(
                    f"--device cuda --tensor-parallel {size} needs {size} GPUs, found {torch.cuda.device_count()}"
                )
        if self.device == "cuda" and not ops.build_info()["cuda"]:
            raise ValueError("--device cuda, but gft_megatron was built without its CUDA operators: build it again")
        for name in ("json", "markdown", "picture"):
            path = getattr(self, name)
            if path is not None and not path.parent.is_dir():  # said now and not when everything has been measured
                raise ValueError(f"--{name} {path}: there is no folder {path.parent}")
        if self.linear and set(self.tensor_parallel) != {1}:
            raise ValueError("--linear measures one rank: leave --tensor-parallel at 1")
        if not 0.0 <= self.ignored_share < 1.0:
            raise ValueError(f"--ignored-share must be in [0, 1), got {self.ignored_share}")
        if self.ignored_share and not self.linear:
            raise ValueError("--ignored-share belongs to --linear: the other operators have no way to ignore a token")


@dataclass(frozen=True)
class Row:
    """One line of the table, and of the JSON file; its fields are described at the top."""

    name: str
    device: str
    dtype: str
    tensor_parallel: int
    seconds: float
    cpu_seconds: float | None
    gb_per_s: float | None
    floor_share: float | None
    peak_extra_bytes: int | None
    collectives: int
    max_abs_error: float | None

    @property
    def cost(self) -> float:
        """The time that ratios are made of: CPU-seconds count the work even where others use the machine too."""
        return self.seconds if self.cpu_seconds is None else self.cpu_seconds


@dataclass(frozen=True)
class Result:
    """What a candidate computed. The gradient is that of the mean over all tokens."""

    loss: Tensor | None  # [n], None where only its mean exists
    grad: Tensor  # [n, v/p], or [n, h]


@dataclass(frozen=True)
class Candidate:
    """One operator. `run` gets what `fresh` of its problem made; a candidate that computes no loss returns None."""

    name: str
    run: Callable[..., Result | None]
    with_entropy: bool = False
    floor: float | None = None  # the floor is this many times this candidate's time
    work: float = 1.0  # the share of the floor's work that this candidate cannot avoid
    ours: bool = False  # if not: an error leaves it out instead of ending the run


class Problem(Protocol):
    """Inputs of one data type on one rank, and who shall deal with them."""

    floor_bytes: int | None

    def fresh(self) -> tuple[Tensor, ...]:
        """The arguments of `Candidate.run`, unspoilt by the one before."""

    def candidates(self) -> Iterator[Candidate | str]:
        """Who takes part; a string says who does not, and why."""

    def expected(self, with_entropy: bool) -> tuple[Tensor, Result]:
        """Row numbers [k], and what stands there in float64: loss [k], gradient of the sum of the losses [k, ...]."""


# ---------------------------------------------------------------------------------------------------------------------
# Loss on logits


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
        rows = _sampled(torch.arange(len(self.labels), device=self.labels.device))
        shard = self.logits[rows].float()
        shards = [torch.empty_like(shard) for _ in range(self.size)]
        dist.all_gather(shards, shard, group=self.tp_group)
        answer = _dense(torch.cat(shards, dim=-1).double(), self.labels[rows], with_entropy)
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
            yield _where_it_runs(name, self.settings.device, build)

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


def _where_it_runs(name: str, device: str, build: Callable[[], Callable]) -> Candidate | str:
    if device != "cuda":
        return f"{name}: needs a GPU"
    try:
        return Candidate(name, build())
    except ImportError:
        return f"{name}: not installed"


def _sampled(live: Tensor) -> Tensor:  # [m] row numbers -> [at most SAMPLED_ROWS]
    at = torch.linspace(0, len(live) - 1, min(SAMPLED_ROWS, len(live))).round().long()
    return live[at.to(live.device)]


def _dense(logits: Tensor, labels: Tensor, with_entropy: bool) -> Result:  # [k, v] fp64
    leaf = logits.requires_grad_()
    log_p = leaf.log_softmax(-1)
    loss = -log_p.gather(-1, labels[:, None])[:, 0]
    if with_entropy:
        loss = loss + (log_p.exp() * log_p).sum(-1)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return Result(loss.detach(), grad)


# ---------------------------------------------------------------------------------------------------------------------
# Output layer and loss


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
        rows = _sampled((self.some_labels != -100).nonzero()[:, 0])
        hidden, pieces = self.hidden.detach()[rows].double(), self.weight.detach().split(8192)
        answer = _dense(torch.cat([hidden @ w.double().t() for w in pieces], dim=-1), self.labels[rows], with_entropy)
        grads = answer.grad.split(8192, dim=-1)
        return rows, Result(answer.loss, sum(g @ w.double() for g, w in zip(grads, pieces, strict=True)))

    def candidates(self) -> Iterator[Candidate | str]:
        yield Candidate(GEMMS, _three_gemms, floor=1.0)
        yield Candidate(TORCH_LINEAR, self._per_token(_torch_linear, self.labels))
        yield _where_it_runs("Liger fused linear cross entropy", self.settings.device, self._liger)
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


# ---------------------------------------------------------------------------------------------------------------------
# Measuring, on each rank


@dataclass
class Measured:
    """One candidate on one rank."""

    seconds: list[float]
    cpu_seconds: list[float]
    peak_extra_bytes: int | None = None
    collectives: int = 0
    max_abs_error: float | None = None


def measure_problem(
    problem: Problem, settings: BenchLoss, tp_group: dist.ProcessGroup, say: Callable[[str], None]
) -> tuple[dict[str, Measured], list[Candidate], list[str]]:
    candidates, reasons = [], []
    for candidate in problem.candidates():
        if isinstance(candidate, str):
            reasons.append(candidate)
            continue
        say(f"warming up: {candidate.name}")
        try:
            candidate.run(*problem.fresh())
        except Exception as error:  # somebody else's code: say so, and go on without it
            if candidate.ours:
                raise
            reasons.append(f"{candidate.name}: {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}")
            continue
        candidates.append(candidate)

    say("checking values, memory and collectives")
    measured = {candidate.name: Measured([], []) for candidate in candidates}
    answers = {with_entropy: problem.expected(with_entropy) for with_entropy in {c.with_entropy for c in candidates}}
    for candidate in candidates:
        it = measured[candidate.name]
        arguments = problem.fresh()
        started = tp_group._get_sequence_number_for_group()
        with _PeakMemory(settings.device) as memory:
            result = candidate.run(*arguments)
        it.collectives = tp_group._get_sequence_number_for_group() - started
        it.peak_extra_bytes = memory.peak_extra_bytes
        if result is not None:
            it.max_abs_error = _error(result, *answers[candidate.with_entropy], settings.num_tokens)
        del result, arguments

    take_time = _time_on_gpu if settings.device == "cuda" else _time_on_cpu
    for number in range(settings.repeats):
        say(f"round {number + 1} of {settings.repeats}")
        for candidate in candidates:
            take_time(candidate, problem, tp_group, measured[candidate.name])
    return measured, candidates, reasons


def _time_on_cpu(candidate: Candidate, problem: Problem, tp_group: dist.ProcessGroup, it: Measured) -> None:
    arguments = problem.fresh()
    dist.barrier(tp_group)
    wall, cpu = time.perf_counter(), time.process_time()
    result = candidate.run(*arguments)
    it.cpu_seconds.append(time.process_time() - cpu)
    if tp_group.size() > 1:
        dist.barrier(tp_group)
    it.seconds.append(time.perf_counter() - wall)
    del result


def _time_on_gpu(candidate: Candidate, problem: Problem, tp_group: dist.ProcessGroup, it: Measured) -> None:
    arguments = problem.fresh()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier(tp_group)
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000)  # about 2 ms, in which the host gets ahead: launching is not what is measured
    start.record()
    result = candidate.run(*arguments)
    end.record()
    torch.cuda.synchronize()
    it.seconds.append(start.elapsed_time(end) / 1e3)
    del result


class _PeakMemory:
    """How much more memory was held inside the block, at most, than before it. None where the system does not tell."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.peak_extra_bytes: int | None = None

    def __enter__(self) -> _PeakMemory:
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and not yet given back would hide new allocations
        self.before = _status_bytes("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        except OSError:
            self.before = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
            self.peak_extra_bytes = torch.cuda.max_memory_allocated() - self.before
        elif self.before is not None:
            self.peak_extra_bytes = max(0, _status_bytes("VmHWM") - self.before)


def _status_bytes(name: str) -> int:
    return int(re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def _error(result: Result, rows: Tensor, expected: Result, num_tokens: int) -> float:
    grad = result.grad[rows].double() * num_tokens
    errors = [(grad - expected.grad).abs().max()]
    if result.loss is not None:
        errors.append((result.loss[rows].double() - expected.loss).abs().max())
    return float(torch.stack(errors).max())


def _run_rank(rank: int, settings: BenchLoss, size: int, folder: Path) -> None:
    warnings.simplefilter("ignore")  # other projects' deprecations are not this tool's output
    # Compiling in this process leaves no other behind.
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(settings.threads)
    if settings.device == "cuda":
        torch.cuda.set_device(rank)
    from megatron.core import parallel_state

    backend = "nccl" if settings.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=(folder / "rendezvous").as_uri(), rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    try:
        tp_group = parallel_state.get_tensor_model_parallel_group()
        rows, reasons = _measure_dtypes(settings, tp_group)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps([[dataclasses.asdict(row) for row in rows], reasons]))


def _measure_dtypes(settings: BenchLoss, tp_group: dist.ProcessGroup) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    reasons: list[str] = []
    size = tp_group.size()
    for dtype in settings.dtype:
        title = f"{dtype} TP{size}"

        def say(text: str, title: str = title) -> None:
            if tp_group.rank() == 0:
                print(f"{title}: {text}", flush=True)

        say("making the inputs")
        problem_type = LinearProblem if settings.linear else LogitsProblem
        problem = problem_type(settings, DTYPES[dtype], tp_group)
        measured, candidates, left_out = measure_problem(problem, settings, tp_group, say)
        ranks: list[dict[str, Measured]] = [{} for _ in range(size)]
        dist.all_gather_object(ranks, measured, group=tp_group)
        by_candidate = [(candidate, [rank[candidate.name] for rank in ranks]) for candidate in candidates]
        rows += _rows(by_candidate, settings, dtype, problem.floor_bytes)
        if any(it.peak_extra_bytes is None for it in measured.values()):
            left_out.append("extra MB: this system refuses /proc/self/clear_refs")
        reasons += [f"{reason} ({title})" for reason in left_out]
        del problem
    return rows, reasons


def _rows(
    by_candidate: list[tuple[Candidate, list[Measured]]], settings: BenchLoss, dtype: str, floor_bytes: int | None
) -> list[Row]:
    rows = []
    floor: float | None = None
    for candidate, ranks in by_candidate:
        seconds = min(map(max, zip(*(it.seconds for it in ranks), strict=True)))
        cpu_seconds = None
        if settings.device == "cpu":
            cpu_seconds = min(
                sum(round_) / len(ranks) for round_ in zip(*(it.cpu_seconds for it in ranks), strict=True)
            )
        cost = seconds if cpu_seconds is None else cpu_seconds
        if candidate.floor is not None:
            floor = candidate.floor * cost
        is_copy = candidate.name == COPY
        moved = None if floor_bytes is None else floor_bytes * 2 / 3 if is_copy else floor_bytes
        peaks = [it.peak_extra_bytes for it in ranks]
        errors = [it.max_abs_error for it in ranks]
        rows.append(
            Row(
                name=candidate.name,
                device=settings.device,
                dtype=dtype,
                tensor_parallel=len(ranks),
                seconds=seconds,
                cpu_seconds=cpu_seconds,
                gb_per_s=None if moved is None else moved / seconds / 1e9,
                floor_share=1.0
                if candidate.floor is not None
                else None
                if floor is None
                else candidate.work * floor / cost,
                peak_extra_bytes=None if None in peaks else max(peaks),
                collectives=max(it.collectives for it in ranks),
                max_abs_error=None if None in errors else max(errors),
            )
        )
    return rows


def measure(settings: BenchLoss) -> tuple[list[Row], list[str]]:
    """All rows, and a line for everything that could not be measured. Starts the ranks as processes of their own."""
    rows: list[Row] = []
    reasons: list[str] = []
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # read by the ranks when they start
    for size in settings.tensor_parallel:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            context = mp.start_processes(
                _run_rank, (settings, size, folder), nprocs=size, join=False, start_method="spawn"
            )
            try:
                while not context.join():
                    pass
            finally:
                for process in context.processes:
                    if process.is_alive():
                        process.kill()
                    process.join()
            found, left_out = json.loads((folder / "rows.json").read_text())
        rows += [Row(**row) for row in found]
        reasons += left_out
    return rows, _merged(reasons)


def _merged(reasons: list[str]) -> list[str]:
    """One line a reason, with all the sections that it holds for: `what: why (fp32 TP1, bf16 TP1)`."""
    sections: dict[str, list[str]] = {}
    for reason in reasons:
        text, _, section = reason.rpartition(" (")
        sections.setdefault(text, []).append(section.rstrip(")"))
    return [f"{text} ({', '.join(names)})" for text, names in sections.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Showing

HEADINGS = ["", "dtype", "TP", "ms", "CPU ms", "GB/s", "of floor", "extra MB", "collectives", "max error"]


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: Callable[[float], str]) -> str:
        return "-" if value is None else form(value)

    def milliseconds(value: float) -> str:
        return f"{value * 1e3:,.1f}" if value >= 1e-3 else f"{value * 1e3:.3f}"

    return [
        row.name,
        row.dtype,
        str(row.tensor_parallel),
        milliseconds(row.seconds),
        number(row.cpu_seconds, milliseconds),
        number(row.gb_per_s, lambda x: f"{x:,.1f}"),
        number(row.floor_share, lambda x: f"{x:.0%}"),
        number(row.peak_extra_bytes, lambda x: f"{x / 1e6:,.1f}"),
        str(row.collectives),
        number(row.max_abs_error, lambda x: f"{x:.1e}"),
    ]


def ratios(rows: list[Row]) -> list[str]:
    """What the table says about ours, in words."""
    lines = []
    for dtype, size in dict.fromkeys((row.dtype, row.tensor_parallel) for row in rows):
        found = {row.name: row for row in rows if (row.dtype, row.tensor_parallel) == (dtype, size)}
        said = _linear_ratios(found) if GEMMS in found else _logits_ratios(found)
        lines += [f"{dtype} TP{size}: {text}" for text in said]
    return lines


def _logits_ratios(found: dict[str, Row]) -> Iterator[str]:
    for name, row in found.items():
        if name.startswith((f"{OURS} +", "ours one sweep")):
            yield f"{name} takes {row.cost / found[OURS].cost:.2f}x the time of {OURS}"
        elif name not in (COPY, OURS):
            yield f"{OURS} is {row.cost / found[OURS].cost:.1f}x as fast as {name}"


def _linear_ratios(found: dict[str, Row]) -> Iterator[str]:
    for name, row in found.items():
        if name in (GEMMS, TORCH_LINEAR):
            continue
        whole, comma, _ = name.partition(",")
        base = whole if comma else GEMMS
        text = f"{name} takes {row.cost / found[base].cost:.2f}x the time of {base}"
        naive = found[TORCH_LINEAR].peak_extra_bytes
        if row.peak_extra_bytes is not None and naive:
            text += f" and {row.peak_extra_bytes / naive:.2f}x the memory of {TORCH_LINEAR}"
        yield text


def machine(settings: BenchLoss) -> str:
    """One line that says what the figures belong to."""
    if settings.device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = names[0] if names else platform.machine()
    threads = f"{settings.threads} thread{'s' if settings.threads > 1 else ''} a rank"
    sizes = f"{settings.num_tokens:,} tokens, vocabulary {settings.vocab_size:,}"
    if settings.linear:
        sizes += f", hidden size {settings.hidden_size:,}"
    what = f"operators: {ops.build_info()['isa']}, " if settings.device == "cpu" else ""
    return f"{name}, {what}torch {torch.__version__}, {threads}, {datetime.date.today()}; {sizes}"


def show(rows: list[Row], reasons: list[str], settings: BenchLoss) -> None:
    """The table on standard output: in colours on a terminal, in plain aligned lines elsewhere."""
    console = Console() if sys.stdout.isatty() else Console(width=200)
    table = Table(*HEADINGS, box=None, pad_edge=False, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for before, row in zip([None, *rows], rows, strict=False):
        if before and (before.dtype, before.tensor_parallel) != (row.dtype, row.tensor_parallel):
            table.add_row()
        table.add_row(*_cells(row), style="bold" if _is_ours(row) else None)
    console.print()
    console.print(machine(settings), highlight=False)
    console.print(table)
    for reason in reasons:
        console.print(f"left out: {reason}", style="dim", highlight=False, markup=False)
    for line in ratios(rows):
        console.print(line, highlight=False)


def _is_ours(row: Row) -> bool:
    return "ours" in row.name or row.name.startswith("linear_")


def markdown(rows: list[Row], reasons: list[str], settings: BenchLoss) -> str:
    """The same for a README."""
    lines = [
        machine(settings),
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---" * 3 + "|---:" * (len(HEADINGS) - 3) + "|",
    ]
    for row in rows:
        cells = _cells(row)
        lines.append("| " + " | ".join([f"**{cells[0]}**" if _is_ours(row) else cells[0], *cells[1:]]) + " |")
    lines += ["", *(f"* {line}" for line in ratios(rows)), *(f"* left out: {reason}" for reason in reasons)]
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], settings: BenchLoss, path: Path) -> None:
    """Horizontal bars of time, one panel for each data type and number of ranks, the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row.dtype, row.tensor_parallel) for row in rows))
    bars = [[row for row in rows if (row.dtype, row.tensor_parallel) == panel] for panel in panels]
    heights = [0.9 + 0.3 * len(group) for group in bars]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    unit = "CPU milliseconds" if settings.device == "cpu" else "milliseconds"
    for (dtype, size), group, axis in zip(panels, bars, axes[:, 0], strict=True):
        shown = [row for row in group if row.name not in (COPY, GEMMS)]
        times = [row.cost * 1e3 for row in shown]
        colours = ["#2a7f62" if _is_ours(row) else "#b8bec6" for row in shown]
        places = range(len(shown))
        drawn = axis.barh(places, times, color=colours)
        axis.bar_label(drawn, [f"{value:,.1f}" if value < 100 else f"{value:,.0f}" for value in times], padding=3)
        axis.set_yticks(places, [row.name for row in shown])
        axis.invert_yaxis()
        floors = [row.cost * 1e3 * row.floor_share for row in shown if row.floor_share is not None]
        if floors:
            label = "three bare GEMMs" if settings.linear else "byte floor at copy speed"
            axis.axvline(floors[0], color="#c0392b", linestyle="--", linewidth=1, label=label)
            axis.legend(loc="lower right", frameon=False)
        axis.set_xlim(0, max(times) * 1.12)
        axis.set_title(f"{dtype}, tensor parallel {size}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"forward + backward, {unit}\n{machine(settings)}", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    try:
        settings = parse_flags(BenchLoss, description=__doc__)
        rows, reasons = measure(settings)
        show(rows, reasons, settings)
        if settings.json is not None:
            settings.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
        if settings.markdown is not None:
            settings.markdown.write_text(markdown(rows, reasons, settings))
        if settings.picture is not None:
            draw(rows, settings, settings.picture)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
