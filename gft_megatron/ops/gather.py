"""The one collective of a vocabulary-parallel softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


def start_gather(stats: Tensor, tp_group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    """Begin to gather the statistics [n, k] of all shards, a few numbers a token. What is returned waits: [p, n, k].

    Args:
        tp_group: None where this is the only shard.
    """
    if tp_group is None or len(stats) == 0:
        return lambda: stats[None]
    size = dist.get_world_size(tp_group)
    gathered = stats.new_empty((size * len(stats), stats.shape[1]))
    work = dist.all_gather_into_tensor(gathered, stats, group=tp_group, async_op=True)

    def arrived() -> Tensor:
        work.wait()
        return gathered.view(size, *stats.shape)

    return arrived
