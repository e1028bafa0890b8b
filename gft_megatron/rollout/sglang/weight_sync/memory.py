"""GPU memory of servers that share their GPUs with the trainer: released for training, resumed with the next weights.

    release -> train -> resume weights -> update -> resume the key-value cache -> continue

A server asked to resume what it has not released, or to generate without its memory, ends itself. So it says in its own
weight version what it has released: a restarted server, or a restarted trainer, cannot be wrong about it. It stays
paused from the release to the end of the next update (update.py).

The servers have to be started with --enable-memory-saver; without it (on a CPU) they answer and release nothing.
"""

from __future__ import annotations

from gft_megatron.rollout.sglang.http import Http
from gft_megatron.rollout.sglang.weight_sync import versions

_RELEASED = "released"
_RELEASED_CACHE = "released-cache"  # the weights' memory is there again
_SEC = 120.0


def is_released(version: str) -> bool:
    return version in (_RELEASED, _RELEASED_CACHE)


async def release(http: Http, url: str) -> None:
    """Abort what runs, pause, and free the memory of weights and cache. The weights are lost.

    Raises:
        WorkerError
    """
    await http.call(url, "/pause_generation", {"mode": "abort"}, timeout_sec=_SEC, admin=True)
    await versions.rename(http, url, _RELEASED)
    await _move(http, url, "release", "kv_cache", "weights")


async def resume_weights(http: Http, url: str, version: str) -> None:
    """Raises: WorkerError."""
    if version == _RELEASED:
        await _move(http, url, "resume", "weights")
        await versions.rename(http, url, _RELEASED_CACHE)


async def resume_cache(http: Http, url: str, version: str) -> None:
    """Raises: WorkerError."""
    await _move(http, url, "resume", "kv_cache")
    await versions.rename(http, url, version)


async def _move(http: Http, url: str, verb: str, *tags: str) -> None:
    path = f"/{verb}_memory_occupation"
    await http.call(url, path, {"tags": tags}, timeout_sec=_SEC, admin=True)
