"""What the rollout engine may ask of whatever brings the trainer's weights to the servers."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gft_megatron.rollout.sglang.http import Http, WorkerError
from gft_megatron.rollout.sglang.weight_sync import memory
from gft_megatron.rollout.sglang.weight_sync.update import Update, updating


@dataclass(frozen=True)
class SyncResult:
    """What came of giving workers new weights."""

    acknowledged: tuple[str, ...]
    """Workers that have the new version and serve it."""
    failed: dict[str, str]
    """Worker -> why it does not. One that still answers does not claim to have the version either."""
    seconds: float
    bytes: int
    """Of one copy of the weights."""


class WeightSync(ABC):
    """Brings weights to servers. All calls come from one event loop."""

    _in_session: ClassVar[bool]
    """The weights go as tensors, not as files."""

    def __init__(self, http: Http, *, compare_checksums: bool = False) -> None:
        """
        Args:
            compare_checksums: of the workers after each update; they need one parallel layout. Reads all their weights.
        """
        self._http = http
        self._compare_checksums = compare_checksums
        self._lock = asyncio.Lock()

    async def push(
        self, urls: Sequence[str], named_tensors: Iterable[tuple[str, Tensor]], version: int, *, allow_running: bool
    ) -> SyncResult:
        """Give all of these workers the weights. One that fails is left out, the others go on.

        Args:
            named_tensors: (Hugging Face name, whole tensor). Consumed to its end whatever happens, in the calling
                thread: it may be a collective. A tensor is read before the next one is asked for.
            allow_running: requests in flight wait and go on with the new weights; otherwise, and by servers before
                0.5.21, they are aborted.

        Raises:
            ValueError, OSError: the weights could not be written. No worker has been touched.
            Exception: what `named_tensors` raises. No worker is left paused; those that had been given a part of the
                weights say that they have no version.
        """
        started = time.monotonic()
        tensors = iter(named_tensors)
        try:
            async with self._lock:
                update, num_bytes = await self._push(urls, tensors, version, allow_running)
        finally:
            for _ in tensors:
                pass
        return SyncResult(update.acknowledged, update.failed, time.monotonic() - started, num_bytes)

    @abstractmethod
    async def _push(
        self, urls: Sequence[str], tensors: Iterator[tuple[str, Tensor]], version: int, allow_running: bool
    ) -> tuple[Update, int]: ...

    async def catch_up(self, url: str) -> bool:
        """Give a worker that has missed it the version of the last push; False where that takes another push."""
        return False

    async def release_memory(self, urls: Sequence[str]) -> dict[str, str]:
        """Free the GPU memory of these workers; the next push brings it back (memory.py).

        Returns:
            Worker -> reason, of those that failed.
        """
        failed: dict[str, str] = {}

        async def release(url: str) -> None:
            try:
                await memory.release(self._http, url)
            except WorkerError as error:
                failed[url] = str(error)

        async with self._lock:
            await asyncio.gather(*map(release, urls))
        return failed

    @abstractmethod
    async def close(self) -> None:
        """Free what is held for the workers."""

    def _updating(self, urls: Sequence[str], version: int, allow_running: bool) -> AbstractAsyncContextManager[Update]:
        return updating(
            self._http,
            urls,
            version,
            allow_running=allow_running,
            in_session=self._in_session,
            compare_checksums=self._compare_checksums,
        )
