"""Looks at one server again and again, and tells the fleet what it sees."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from gft_megatron.rollout.sglang.dialect import probe_dialect, weight_version
from gft_megatron.rollout.sglang.fleet import Fleet, State
from gft_megatron.rollout.sglang.http import FailureKind, Http, WorkerError
from gft_megatron.rollout.sglang.loads import Load, read_load

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class ProbeLimits:
    every_sec: float = 1.0
    timeout_sec: float = 5.0


@dataclass(frozen=True, kw_only=True)
class Hands:
    """What a watcher may do."""

    own_requests: Callable[[], int]
    """How many of this engine's requests the server has."""
    break_off: Callable[[str], None]
    """Those requests, for a reason."""
    try_out: Callable[[], Awaitable[None]]
    """Have it make a token, and tell the fleet."""
    catch_up: Callable[[], Awaitable[None]] | None
    """Give it the newest weights, and tell the fleet; None where somebody else does."""
    looked: Callable[[], None]
    """Called after every look."""


class Watcher:
    """One server's. It asks for the version of the weights and for the load, never for /health: that one generates, and
    fails while a server is paused."""

    def __init__(self, url: str, http: Http, fleet: Fleet, hands: Hands, limits: ProbeLimits) -> None:
        self._url = url
        self._http = http
        self._fleet = fleet
        self._hands = hands
        self._limits = limits
        self._known = False
        self._looked_at: float | None = None
        self._silent_for = 0.0
        self._wake = asyncio.Event()
        self._trial: asyncio.Task[None] | None = None
        self._catch_up: asyncio.Task[None] | None = None
        self.load: Load | None = None
        """As of the last look."""
        self.moves = False
        """Whether tokens had come then since the look before."""
        self.others = 0
        """Requests that the server had from others then."""

    def wake(self) -> None:
        """Look now."""
        self._wake.set()

    def completed(self) -> None:
        """It gave a whole response."""
        self._silent_for = 0.0

    async def run(self) -> None:
        """Until cancelled.

        Raises:
            ValueError: a server that cannot be used, whatever its state; wrong keys only until some server has served.
        """
        try:
            while True:
                await self._look()
                for task in (self._trial, self._catch_up):
                    if task is not None and task.done() and not task.cancelled():
                        task.result()  # an error of theirs ends this too
                self._act()
                self._hands.looked()
                await self._rest()
        finally:
            await self.stop_catching_up()
            if self._trial is not None:
                self._trial.cancel()
                await asyncio.wait([self._trial])

    async def stop_catching_up(self) -> None:
        if self._catch_up is not None:
            self._catch_up.cancel()
            await asyncio.wait([self._catch_up])

    async def _look(self) -> None:
        if self._fleet.paused:
            self._silent_for = 0.0
            return
        try:
            async with asyncio.timeout(self._limits.timeout_sec):
                if not self._known:
                    await probe_dialect(self._http, self._url)
                    self._known = True
                version = await weight_version(self._http, self._url)
                load = await read_load(self._http, self._url, timeout_sec=self._limits.timeout_sec)
        except (WorkerError, TimeoutError) as error:
            refused = isinstance(error, WorkerError) and error.kind is FailureKind.REFUSED
            if refused and not self._fleet.has_served:  # later on it is one of many that has been started wrongly
                raise ValueError(
                    f"{error}. Is it an SGLang server, and are GFT_SGLANG_API_KEY and GFT_SGLANG_ADMIN_KEY its keys?"
                ) from error
            self.moves = False
            self._fleet.unanswered(self._url, str(error) or "no answer to a probe", self._now())
            if self._fleet.state(self._url) is State.DEAD:
                self._given_up()
            return
        if self._fleet.paused:  # since the questions were asked
            return
        own = self._hands.own_requests()
        on_server = load.running + load.queued
        self.moves = self.load is None or self.load.mark != load.mark
        # Requests that the server knows nothing of do not move, whatever else does.
        alive = not own if not on_server else self.moves
        self._silent_for = 0.0 if alive else self._silent_for + self._elapsed()
        self._looked_at = self._now()
        self.load = load
        self.others = max(0, on_server - own)
        self._fleet.answered(self._url, version, self._now())
        self._fleet.silent(self._url, self._silent_for, self._now())
        if self._silent_for and self._fleet.state(self._url) is State.DEAD:
            self._given_up()

    def _given_up(self) -> None:
        self._known = False  # another release may come back
        self._silent_for = 0.0
        worker = self._fleet.workers.get(self._url)
        self._hands.break_off("" if worker is None else worker.last_failure)

    def _act(self) -> None:
        if self._fleet.paused:
            return
        state = self._fleet.state(self._url)
        if state is State.SUSPECT and _idle(self._trial):
            self._trial = asyncio.ensure_future(self._hands.try_out())
        if (
            state is State.STALE
            and self._hands.catch_up is not None
            and self._fleet.expected is not None
            and self._fleet.workers[self._url].version is not None  # one that was away may have the newest still
            and _idle(self._catch_up)
        ):
            self._catch_up = asyncio.ensure_future(self._hands.catch_up())

    async def _rest(self) -> None:
        # Weights that others send are waited for.
        seconds = self._limits.every_sec / (5 if self._fleet.state(self._url) is State.STALE else 1)
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    def _elapsed(self) -> float:
        """Since the last look; the event loop may have stood still in between, which is no silence of the server's."""
        since = 0.0 if self._looked_at is None else self._now() - self._looked_at
        return min(since, 2 * self._limits.every_sec)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _idle(task: asyncio.Task[None] | None) -> bool:
    return task is None or task.done()
