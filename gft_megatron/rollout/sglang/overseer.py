"""Has every server watched, from when it is listed until it is not, and says when there is no hope left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from gft_megatron.rollout.engine import RequestAborted
from gft_megatron.rollout.sglang.calls import Calls
from gft_megatron.rollout.sglang.client import ModelFacts
from gft_megatron.rollout.sglang.fleet import Fleet, FleetLost, State
from gft_megatron.rollout.sglang.http import FailureKind, Http, WorkerError
from gft_megatron.rollout.sglang.loads import Load
from gft_megatron.rollout.sglang.trial import try_out
from gft_megatron.rollout.sglang.watcher import Hands, ProbeLimits, Watcher

_logger = logging.getLogger(__name__)


class Overseer:
    """Of one engine's servers."""

    def __init__(
        self,
        addresses: Callable[[], Sequence[str]],
        http: Http,
        fleet: Fleet,
        calls: Calls,
        model: ModelFacts,
        *,
        catch_up: Callable[[str], Awaitable[None]] | None,
        looked: Callable[[], None],
        is_needed: Callable[[], bool],
        router_url: str | None,
        probes: ProbeLimits,
        lost_sec: float,
    ) -> None:
        """
        Args:
            addresses: of the servers as of now; asked again and again.
            catch_up: gives a server the newest weights, and tells the fleet; None where another engine does.
            looked: called whenever something may have changed.
            is_needed: whether anybody waits for a server.
            lost_sec: that long without a server that could serve is the end.
        """
        self._addresses = addresses
        self._http = http
        self._fleet = fleet
        self._calls = calls
        self._model = model
        self._catch_up = catch_up
        self._looked = looked
        self._is_needed = is_needed
        self._router_url = router_url
        self._probes = probes
        self._lost_sec = lost_sec
        self._watchers: dict[str, Watcher] = {}
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._overseeing: asyncio.Task[None] | None = None
        self.failure: Exception | None = None
        """What ended it: no request may wait any longer."""

    def start(self) -> None:
        """Once, in the engine's event loop; calls after the first do nothing."""
        if self._overseeing is not None:
            return
        try:
            self._list_workers()
        except (ValueError, OSError) as error:  # told by the next `generate`: an update of weights is a collective
            self.failure = error
        self._overseeing = asyncio.ensure_future(self._guarded(self._oversee()))

    async def close(self) -> None:
        tasks = [*self._watching.values(), *([] if self._overseeing is None else [self._overseeing])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def loads(self) -> list[Load]:
        """Of the servers that told theirs, as of the last look."""
        return [watcher.load for watcher in self._watchers.values() if watcher.load is not None]

    def num_requests(self, url: str) -> int:
        """Of this engine, and of others as of the last look."""
        return len(self._calls.at(url)) + self._watchers[url].others

    def completed(self, target: str) -> None:
        """A whole response came of it."""
        self._fleet.completed(target, self._now())
        if target in self._watchers:  # a router has none
            self._watchers[target].completed()

    def failed(self, error: WorkerError) -> None:
        """A request got no whole response."""
        before = self._fleet.state(error.url)
        self._fleet.failed(error.url, error.kind, str(error), self._now())
        if before is State.HEALTHY and self._fleet.state(error.url) is not before and error.url in self._watchers:
            self._watchers[error.url].wake()

    def look(self) -> None:
        """At all servers, now."""
        for watcher in self._watchers.values():
            watcher.wake()

    async def first_answers(self) -> None:
        """Until no server is only starting any more: they may have been started together with the run."""
        while self.failure is None:
            if not any(worker.state is State.STARTING for worker in self._fleet.workers.values()):
                return
            await asyncio.sleep(self._probes.every_sec / 5)

    async def stop_catching_up(self) -> None:
        """With weights that are about to be replaced."""
        await asyncio.gather(*(watcher.stop_catching_up() for watcher in self._watchers.values()))

    def _list_workers(self) -> None:
        for url in self._fleet.listed(self._addresses(), self._now()):
            self._watching.pop(url).cancel()
            del self._watchers[url]
            self._calls.break_off(url, FailureKind.UNREACHABLE, "its server is no longer listed")
        for url in self._fleet.workers:
            if url not in self._watchers:
                hands = Hands(
                    own_requests=lambda url=url: len(self._calls.at(url)),
                    break_off=partial(self._calls.break_off, url, FailureKind.NO_PROGRESS),
                    try_out=partial(self._try_out, url),
                    catch_up=None if self._catch_up is None else partial(self._catch_up, url),
                    looked=self._looked,
                )
                self._watchers[url] = Watcher(url, self._http, self._fleet, hands, self._probes)
                self._watching[url] = asyncio.ensure_future(self._guarded(self._watchers[url].run()))

    async def _guarded(self, watch: Coroutine[Any, Any, None]) -> None:
        """What ends a watch has to end the run: requests would wait for ever."""
        try:
            await watch
        except Exception as error:
            self.failure = self.failure or error
            self._looked()
            self._calls.break_off_all(FailureKind.NO_PROGRESS, f"the engine ended: {error}")  # nobody watches them

    async def _oversee(self) -> None:
        """What concerns all servers: which there are, whether there is hope, whether anything moves behind a router."""
        hopeless_for = stuck_for = 0.0
        marks: list[object] = []
        unread = ""
        while True:
            await asyncio.sleep(self._probes.every_sec)
            try:
                self._list_workers()
                unread = ""
            except (ValueError, OSError) as error:  # those that are known may be all there are
                if str(error) != unread:
                    unread = str(error)
                    _logger.warning("the servers' addresses cannot be read, the known ones stay: %s", error)
            if not self._fleet.hopeless(self._now()) or self._fleet.paused or not self._is_needed():
                hopeless_for = 0.0
            elif not self._fleet.awaits_weights(self._now()) and not self._gets_on():
                hopeless_for += self._probes.every_sec
            if hopeless_for >= self._lost_sec:
                raise FleetLost(
                    f"no SGLang server could serve for {self._lost_sec:g} s: {self._fleet.describe()}. "
                    f"Start them again, then this run: it goes on from its last checkpoint"
                )
            if self._router_url is not None:
                before, marks = marks, [w.load and w.load.mark for w in self._watchers.values()]
                still = marks == before and not self._fleet.paused and self._calls.at(self._router_url)
                stuck_for = stuck_for + self._probes.every_sec if still else 0.0
                if stuck_for >= self._fleet.limits.dead_sec:
                    stuck_for = 0.0
                    self._calls.break_off(self._router_url, FailureKind.NO_PROGRESS, "no server behind it made a token")

    def _gets_on(self) -> bool:
        """A server makes tokens, and is only too full to show it by a trial."""
        return any(watcher.moves and self._fleet.state(url) is State.SUSPECT for url, watcher in self._watchers.items())

    async def _try_out(self, url: str) -> None:
        assert self._fleet.expected is not None, "a server that has the newest weights"
        try:
            await try_out(self._calls, url, self._model, oldest_version=int(self._fleet.expected))
        except RequestAborted:
            return
        except WorkerError as error:
            self.failed(error)
            return
        self._fleet.completed(url, self._now())
        self._looked()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
