"""One change of weights on several workers at once: pause, change, verify, continue, whatever happens in between.

While its weights are neither the old nor the new ones, a worker's own weight version says so ("incomplete-7"): whoever
asks it, be it another rank or a trainer started after this one died, takes no sample from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from gft_megatron.rollout.sglang.dialect import Dialect, probe_dialect, weight_version
from gft_megatron.rollout.sglang.http import FailureKind, Http, WorkerError
from gft_megatron.rollout.sglang.weight_sync import memory, versions

_CONTROL_SEC = 60.0  # for a call that moves no weights
_TRIES_TO_CONTINUE = 3

T = TypeVar("T")


@asynccontextmanager
async def updating(
    http: Http,
    urls: Sequence[str],
    version: int,
    *,
    allow_running: bool,
    in_session: bool,
    compare_checksums: bool,
) -> AsyncIterator[Update]:
    """Pause the workers for the body, which gives them the weights of `version`; after it they have it or have failed.

    Args:
        allow_running: requests in flight wait and go on with the new weights; otherwise, and by servers before 0.5.21,
            they are aborted.
        in_session: the body sends tensors, which newer servers take only within a session.
        compare_checksums: workers whose weights differ from those of most fail. Takes servers of one parallel layout.
    """
    update = Update(http, urls, version, in_session=in_session)
    try:
        await to_its_end(update.on_each(lambda url: update.open(url, allow_running=allow_running)))
        yield update
        await to_its_end(update.finish(compare_checksums=compare_checksums))
    finally:
        await to_its_end(update.release())


class Update:
    """The workers of one change. One that fails a step takes no part in the next ones."""

    def __init__(self, http: Http, urls: Sequence[str], version: int, *, in_session: bool) -> None:
        self._http = http
        self._urls = tuple(dict.fromkeys(urls))
        self._version = version
        self._in_session = in_session
        self._dialects: dict[str, Dialect] = {}
        self._paused: list[str] = []
        self._without_cache: set[str] = set()
        self._complete: set[str] = set()
        self.failed: dict[str, str] = {}
        """Worker -> why."""

    @property
    def live(self) -> tuple[str, ...]:
        return tuple(url for url in self._urls if url not in self.failed)

    @property
    def acknowledged(self) -> tuple[str, ...]:
        """Workers that serve the new weights."""
        return tuple(url for url in self.live if url in self._complete)

    def fail(self, url: str, reason: str) -> None:
        self.failed.setdefault(url, reason)

    async def on_each(self, step: Callable[[str], Awaitable[object]]) -> None:
        """Do `step(url)` on all live workers at once.

        Raises:
            Exception: what a step raises beside WorkerError, when all have ended.
        """

        async def attempt(url: str) -> None:
            try:
                await step(url)
            except WorkerError as error:
                self.fail(url, str(error))

        for outcome in await asyncio.gather(*map(attempt, self.live), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def open(self, url: str, *, allow_running: bool) -> None:
        self._dialects[url] = await probe_dialect(self._http, url)
        self._paused.append(url)  # before the call: it may be heard and its answer lost
        # Before 0.5.21 a server that has to forget its cache while requests wait ends itself.
        waiting = allow_running and self._dialects[url].needs_begin_end
        await self._call(url, "/pause_generation", {"mode": "retract" if waiting else "abort"})
        found = await weight_version(self._http, url)
        if memory.is_released(found):
            await memory.resume_weights(self._http, url, found)
            self._without_cache.add(url)
        else:
            await versions.rename(self._http, url, versions.incomplete(self._version))
        if self._uses_session(url):
            await self._begin(url)

    async def _begin(self, url: str) -> None:
        try:
            await self._call(url, "/begin_weight_update", {"selector": "all"})
        except WorkerError as error:
            if error.kind is not FailureKind.REFUSED:
                raise
            await self._call(url, "/end_weight_update", {})  # a trainer that died has left it open
            await self._call(url, "/begin_weight_update", {"selector": "all"})

    async def finish(self, *, compare_checksums: bool) -> None:
        await self.on_each(self._end)
        if compare_checksums:
            for url, reason in (await versions.unequal_checksums(self._http, self.live)).items():
                self.fail(url, reason)
        await self.on_each(self._name)

    async def _end(self, url: str) -> None:
        if self._uses_session(url):
            await self._call(url, "/end_weight_update", {})
        if url in self._without_cache:
            await memory.resume_cache(self._http, url, versions.incomplete(self._version))
            self._without_cache.discard(url)

    async def _name(self, url: str) -> None:
        await versions.rename(self._http, url, str(self._version))
        found = await weight_version(self._http, url)
        if found != str(self._version):
            raise WorkerError(url, FailureKind.MALFORMED, f"has weights {found!r} after an update to {self._version}")
        self._complete.add(url)

    async def release(self) -> None:
        """Let every worker that was paused go on."""
        await asyncio.gather(*map(self._release, self._paused))

    async def _release(self, url: str) -> None:
        if url not in self._complete:
            self.fail(url, "the update was not finished")
            await self._clean_up(url)
        for _ in range(_TRIES_TO_CONTINUE):
            try:
                await self._call(url, "/continue_generation", {})
                return
            except WorkerError as error:
                reason = f"has not been told to continue: {error}"
        self.fail(url, reason)

    async def _clean_up(self, url: str) -> None:
        """What was running would go on with weights that are neither old nor new."""
        try:
            await self._call(url, "/abort_request", {"abort_all": True})
            await self._end(url)
        except WorkerError:
            pass  # it has failed already, for a reason that says more

    def _uses_session(self, url: str) -> bool:
        return self._in_session and self._dialects[url].needs_begin_end

    async def _call(self, url: str, path: str, body: dict[str, Any]) -> None:
        await self._http.call(url, path, body, timeout_sec=_CONTROL_SEC, admin=True)


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is done even if the caller is cancelled meanwhile; that is raised afterwards.

    A call that changes a server must not be left half sent: the next one could overtake it.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue
        raise
