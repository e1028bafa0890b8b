"""Runs a function on several gloo ranks of this machine."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COLLECTIVES = [
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter_tensor",
    "send",
]


def _run_rank(rank: int, fn: Callable[..., None], world_size: int, rendezvous: str, timeout_sec: float, args) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_sec)
    )
    try:
        fn(rank, world_size, *args)
    finally:
        dist.destroy_process_group()


def run_on_ranks(fn: Callable[..., None], world_size: int, *args: object, timeout_sec: float = 120.0) -> None:
    """Call `fn(rank, world_size, *args)` in as many spawned processes, inside the default (gloo) group.

    `fn` must be a module-level function.

    Raises:
        torch.multiprocessing.ProcessRaisedException: `fn` raised on a rank; holds that rank's traceback.
        TimeoutError: not all ranks returned in time; they have been killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = Path(folder, "rendezvous").as_uri()
        arguments = (fn, world_size, rendezvous, timeout_sec, args)
        context = mp.start_processes(_run_rank, arguments, nprocs=world_size, join=False, start_method="spawn")
        deadline = time.monotonic() + timeout_sec
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{fn.__name__} on {world_size} ranks took more than {timeout_sec} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()


def count_collectives() -> list[str]:
    """The names of the collectives that are called from now on."""
    calls: list[str] = []

    def counted(name: str):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name))
    return calls
