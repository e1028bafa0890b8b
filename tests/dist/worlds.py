"""One launch for jobs of several world sizes: starting a rank costs more than most jobs take."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist


def run_in_worlds(jobs: dict[int, list[str]], run: Callable[[str], None], folder: Path) -> None:
    """Call `run(job)` inside a default (gloo) group of as many ranks as the job wants: jobs[size].

    The ranks that torchrun started make up as many worlds of a size as they can, which share its jobs.

    Args:
        folder: seen by all ranks; nothing of this kind is in it.
    """
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for size, names in jobs.items():
        assert num_ranks % size == 0, (num_ranks, size)
        world = rank // size
        store = dist.FileStore(str(folder / f"store-{size}-{world}"), size)
        dist.init_process_group("gloo", store=store, rank=rank % size, world_size=size)
        for name in names[world :: num_ranks // size]:
            run(name)
        dist.destroy_process_group()
