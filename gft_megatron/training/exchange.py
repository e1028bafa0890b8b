"""What ranks tell each other outside the model: collected samples, counters, the result of work done by one of them.

Each collector (a rank with an engine) holds the groups of its own prompts. All ranks gather all of them and then make
the same plan of micro-batches from the same data, so the samples of a step do not depend on the parallel layout. A
rollout of 1,024 x 8 responses of 2,000 tokens is about 330 MB a rank, host memory, once a rollout.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gft_megatron.groups import Batch

T = TypeVar("T")

_LONGEST_WORK_SEC = 24 * 3600.0


def gather_batch(mine: Batch) -> Batch:
    """The samples of all ranks, ordered by group id. Collective over the world; a rank without an engine gives none."""
    arrays = [getattr(mine, f.name).numpy() for f in fields(Batch)]
    gathered = Batch(**{f.name: t for f, t in zip(fields(Batch), _gather_ragged(arrays), strict=True)})
    return gathered.select(torch.argsort(gathered.group_ids, stable=True).tolist())


def sum_over_ranks(values: list[float]) -> list[float]:
    """Element-wise sum over the world."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def max_over_ranks(values: list[float]) -> list[float]:
    """Element-wise maximum over the world."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return total.tolist()


class FailedElsewhere(Exception):
    """What another rank failed with, in its words."""


def all_or_none(work: Callable[[], T]) -> T:
    """Run `work` on every rank; collective. If it fails on one, it fails on all, and none waits for another.

    Raises:
        FailedElsewhere: it went well here, but not everywhere.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as failure:  # whatever it is, the others must not wait for it
        error = failure
    _wait_for_all()
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    for message in told:
        if message is not None:
            raise FailedElsewhere(message)
    return result  # type: ignore[return-value]


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and give everybody its result, or everybody its exception."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # whatever it is, the others must not wait for it
            outcome[1] = error
    _wait_for_all()
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _wait_for_all() -> None:
    """Return when every rank has called this.

    A collective would end the run after --distributed-timeout-minutes, and a rollout may well take longer. Each rank's
    work has limits of its own, and torchrun ends the others when one has died.

    Raises:
        TimeoutError: one has not come in a day.
    """
    store = dist.distributed_c10d._get_default_store()
    # Ranks call this in the same order. Counted in the store, for the next group of this process starts anew.
    number = store.add(f"gft_megatron/meetings/{dist.get_rank()}", 1)
    began = time.monotonic()
    if store.add(f"gft_megatron/meeting/{number}", 1) == dist.get_world_size():
        store.set(f"gft_megatron/met/{number}", "")
        # All are here, so all have left the meeting before.
        store.delete_key(f"gft_megatron/meeting/{number - 1}")
        store.delete_key(f"gft_megatron/met/{number - 1}")
        return
    while not store.check([f"gft_megatron/met/{number}"]):
        if (waited := time.monotonic() - began) > _LONGEST_WORK_SEC:
            raise TimeoutError(f"some rank has been at its work for {waited / 3600:.0f} hours: the others give up")
        time.sleep(min(max(waited / 50, 0.001), 0.25))  # whoever waits for this rank waits that much longer


def _gather_ragged(mine: list[np.ndarray]) -> list[Tensor]:  # [n of this rank] each -> [n of all ranks] each
    # As bytes, for gloo knows no bool; and rank by rank, for in one gather each would take the room of the largest.
    sizes = torch.tensor([array.nbytes for array in mine])
    all_sizes = [torch.empty_like(sizes) for _ in range(dist.get_world_size())]
    dist.all_gather(all_sizes, sizes)
    by_rank = []
    for rank, of_rank in enumerate(all_sizes):
        if rank == dist.get_rank():
            part = torch.from_numpy(np.concatenate([array.view(np.uint8) for array in mine]))
        else:
            part = torch.empty(int(of_rank.sum()), dtype=torch.uint8)
        if part.numel():
            dist.broadcast(part, src=rank)
        by_rank.append(part.split(of_rank.tolist()))
    return [
        torch.from_numpy(torch.cat(pieces).numpy().view(array.dtype))
        for array, *pieces in zip(mine, *by_rank, strict=True)
    ]
