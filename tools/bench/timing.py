"""Time, memory, collectives and errors of all candidates of one problem, on one rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from bench.candidates import Candidate, Problem, Result
from bench.memory import PeakMemory
from bench.settings import BenchLoss
from torch import Tensor


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
        with PeakMemory(settings.device) as memory:
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


def _error(result: Result, rows: Tensor, expected: Result, num_tokens: int) -> float:
    grad = result.grad[rows].double() * num_tokens
    errors = [(grad - expected.grad).abs().max()]
    if result.loss is not None:
        errors.append((result.loss[rows].double() - expected.loss).abs().max())
    return float(torch.stack(errors).max())
