"""Layouts as the tests name them: TPxPP for the models without experts, TPxPPxEP or TPxPPxEPxETP for those with."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from worlds import run_in_worlds

from gft_megatron.config import ParallelConfig
from gft_megatron.convert import ModelShape
from gft_megatron.training import cpu


def has_experts(layout: str) -> bool:
    return layout.count("x") > 1


def is_for(layout: str, shape: ModelShape) -> bool:
    return has_experts(layout) == (shape.moe is not None)


def parallel_of(layout: str) -> ParallelConfig:
    tp_size, pp_size, ep_size, etp_size = (*map(int, layout.split("x")), 1, 1)[:4]
    return ParallelConfig(
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        expert_model_parallel_size=ep_size,
        expert_tensor_parallel_size=etp_size,
        sequence_parallel=tp_size > 1 and has_experts(layout),  # as a model with experts wants it
    )


def by_num_ranks(layouts: list[str]) -> dict[int, list[str]]:
    jobs: dict[int, list[str]] = {}
    for layout in layouts:
        parallel = parallel_of(layout)
        experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
        num_ranks = parallel.pipeline_model_parallel_size * max(parallel.tensor_model_parallel_size, experts)
        jobs.setdefault(num_ranks, []).append(layout)
    return jobs


def run_layouts(run_layout: Callable[[str, list[Path], Path], None]) -> None:
    """The main function of a worker: call `run_layout(layout, folders, out)` on the ranks that each layout wants."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folders", nargs="+", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layouts", nargs="+", required=True)
    arguments = parser.parse_args()
    cpu.install()
    torch.set_num_threads(1)
    jobs = by_num_ranks(arguments.layouts)
    run_in_worlds(jobs, lambda layout: run_layout(layout, arguments.folders, arguments.out), arguments.out)
