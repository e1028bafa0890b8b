"""Starts the ranks, and makes rows of what each of them measured."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench.candidates import COPY, Candidate, Row
from bench.on_hidden import LinearProblem
from bench.on_logits import LogitsProblem
from bench.settings import BenchLoss
from bench.timing import Measured, measure_problem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
