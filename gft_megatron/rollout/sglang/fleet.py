"""What is known of each server, and what follows from it. No input, no output, no clock: time is handed in.

Two rules stand above the rest. Health is tokens that came and were right, never an answer to a question after it. And a
server that was given up serves again only after it has told, as one that is alive, that it has the newest weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from gft_megatron.rollout.sglang.http import FailureKind

_INNOCENT = frozenset({FailureKind.OVERLOADED, FailureKind.REFUSED, FailureKind.ABORTED})
"""Failures that say nothing against a server: it has enough to do, the request is wrong, somebody gave it up."""


class FleetLost(Exception):
    """No server can serve any more: the run ends. What was collected is kept."""


class State(StrEnum):
    STARTING = "starting"
    """It has not answered yet."""
    STALE = "stale"
    """It answers, but its weights are not the newest."""
    SUSPECT = "suspect"
    """It has the newest weights; whether tokens come of it is to be shown, by a trial or by what it still has to do."""
    HEALTHY = "healthy"
    """The only ones that are sent requests."""
    DEAD = "dead"
    """Given up."""


@dataclass(frozen=True, kw_only=True)
class HealthLimits:
    """When what is concluded."""

    suspect_sec: float = 10.0
    """Without a token while there is something to do."""
    dead_sec: float = 30.0
    """The same, until it is given up and its requests go elsewhere."""
    stale_dead_sec: float = 600.0
    """The same while its weights are changing: it may be paused."""
    start_sec: float = 300.0
    """Without a first answer."""
    misses: int = 3
    """Probes without an answer, and no completion in between."""
    failures: int = 3
    """Requests without a completion in between."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One server. Every method is an event, and returns what the server is after it."""

    url: str
    since: float
    """When it came to its state."""
    state: State = State.STARTING
    version: str | None = None
    """Of its weights, as it told last; None if unknown."""
    proved: bool = False
    """Tokens came since the last failure."""
    doubted: bool = False
    """A weight update failed on it: what it tells of its version counts nothing until one succeeds."""
    failures: int = 0
    misses: int = 0
    last_failure: str = ""

    def answered(self, version: str, expected: str | None, now: float) -> Worker:
        """It told its version."""
        if self.state is State.DEAD:
            # It may be another process under the old address.
            return replace(self, misses=0, failures=0, version=None)._to(State.STALE, now)
        known = replace(self, misses=0, version=version)
        if self.doubted or version != expected:
            return known._to(State.STALE, now)
        return known._to(State.HEALTHY if self.proved else State.SUSPECT, now)

    def acknowledged(self, version: str, expected: str | None, now: float) -> Worker:
        """A weight update succeeded on it."""
        return replace(self, doubted=False).answered(version, expected, now)

    def rejected(self, reason: str, now: float) -> Worker:
        """A weight update failed on it."""
        worker = replace(self, doubted=True, last_failure=reason)
        return worker if self.state in (State.DEAD, State.STARTING) else worker._to(State.STALE, now)

    def expects(self, expected: str, now: float) -> Worker:
        """There are newer weights, or older ones again."""
        if self.state in (State.DEAD, State.STARTING):
            return self
        if self.doubted or self.version != expected:
            return self._to(State.STALE, now)
        return self._to(State.HEALTHY if self.proved else State.SUSPECT, now)

    def completed(self, now: float) -> Worker:
        """A whole response came, and was right."""
        if self.state in (State.DEAD, State.STARTING):  # late: it says nothing of who lives there now
            return self
        proved = replace(self, proved=True, failures=0, misses=0)
        return proved if self.state is State.STALE else proved._to(State.HEALTHY, now)

    def failed(self, kind: FailureKind, reason: str, limits: HealthLimits, now: float) -> Worker:
        """A request got no whole response."""
        worker = replace(self, last_failure=reason)
        if kind in _INNOCENT or self.state is State.DEAD:
            return worker
        if kind is FailureKind.STALE:
            return worker if self.state is State.STARTING else replace(worker, version=None)._to(State.STALE, now)
        worker = replace(worker, proved=False, failures=self.failures + 1)
        if self.state is State.STARTING:
            return worker
        if worker.failures >= limits.failures:
            return worker._to(State.DEAD, now)
        return worker if self.state is State.STALE else worker._to(State.SUSPECT, now)

    def unanswered(self, reason: str, limits: HealthLimits, now: float) -> Worker:
        """A probe got no answer."""
        worker = replace(self, proved=False, misses=self.misses + 1, last_failure=reason)
        if self.state is State.STARTING:  # may compile for minutes before it listens
            return worker._to(State.DEAD, now) if now - self.since >= limits.start_sec else worker
        if self.state is State.DEAD or worker.misses >= limits.misses:
            return worker._to(State.DEAD, now)
        return worker if self.state is State.STALE else worker._to(State.SUSPECT, now)

    def silent(self, seconds: float, limits: HealthLimits, now: float) -> Worker:
        """It has had something to do for so long, and no token came of it."""
        limit = limits.stale_dead_sec if self.state is State.STALE else limits.dead_sec
        if self.state in (State.DEAD, State.STARTING) or seconds < min(limit, limits.suspect_sec):
            return self
        worker = replace(self, proved=False, last_failure=f"no token in {seconds:.0f} s")
        if seconds >= limit:
            return worker._to(State.DEAD, now)
        return self if self.state is State.STALE else worker._to(State.SUSPECT, now)

    def _to(self, state: State, now: float) -> Worker:
        return self if state is self.state else replace(self, state=state, since=now)


class Fleet:
    """All servers of a run. While it is paused nothing is concluded from silence."""

    def __init__(self, limits: HealthLimits) -> None:
        self.limits = limits
        self.expected: str | None = None
        self.workers: dict[str, Worker] = {}
        self.paused = False
        self.has_served = False
        """Some server was healthy once."""

    def listed(self, urls: Iterable[str], now: float) -> list[str]:
        """These are the servers now; returns those that are no longer."""
        urls = list(urls)
        gone = [url for url in self.workers if url not in set(urls)]
        for url in gone:
            del self.workers[url]
        for url in urls:
            self.workers.setdefault(url, Worker(url, now))
        return gone

    def state(self, url: str) -> State:
        """DEAD for one that is no longer listed."""
        return self.workers[url].state if url in self.workers else State.DEAD

    def servable(self) -> list[str]:
        return [url for url, worker in self.workers.items() if worker.state is State.HEALTHY]

    def reachable(self) -> list[str]:
        """Those that a weight update can go to."""
        return [url for url, w in self.workers.items() if w.state not in (State.DEAD, State.STARTING)]

    def hopeless(self, now: float) -> bool:
        """No server can serve, and none of them is only starting."""
        return not any(
            worker.state is State.HEALTHY
            or (worker.state is State.STARTING and now - worker.since < self.limits.start_sec)
            for worker in self.workers.values()
        )

    def awaits_weights(self, now: float) -> bool:
        """Some server is to be given the newest weights yet, which may take a while where they are large."""
        return any(
            worker.state is State.STALE and not worker.doubted and now - worker.since < self.limits.stale_dead_sec
            for worker in self.workers.values()
        )

    def weights_expected(self, version: str, now: float) -> None:
        self.expected = version
        for url, worker in self.workers.items():
            self.workers[url] = worker.expects(version, now)

    def answered(self, url: str, version: str, now: float) -> None:
        self._set(url, lambda worker: worker.answered(version, self.expected, now))

    def acknowledged(self, url: str, version: str, now: float) -> None:
        self._set(url, lambda worker: worker.acknowledged(version, self.expected, now))

    def rejected(self, url: str, reason: str, now: float) -> None:
        self._set(url, lambda worker: worker.rejected(reason, now))

    def completed(self, url: str, now: float) -> None:
        self._set(url, lambda worker: worker.completed(now))

    def failed(self, url: str, kind: FailureKind, reason: str, now: float) -> None:
        self._set(url, lambda worker: worker.failed(kind, reason, self.limits, now))

    def unanswered(self, url: str, reason: str, now: float) -> None:
        if not self.paused:
            self._set(url, lambda worker: worker.unanswered(reason, self.limits, now))

    def silent(self, url: str, seconds: float, now: float) -> None:
        if not self.paused:
            self._set(url, lambda worker: worker.silent(seconds, self.limits, now))

    def describe(self) -> str:
        """One line: every server, its state and what went wrong last."""
        if not self.workers:
            return "none is listed"
        return "; ".join(
            f"{w.url} {w.state}" + (f" ({w.last_failure})" if w.last_failure else "") for w in self.workers.values()
        )

    def _set(self, url: str, event: Callable[[Worker], Worker]) -> None:
        if url in self.workers:  # no longer listed: nobody asks
            worker = self.workers[url] = event(self.workers[url])
            self.has_served = self.has_served or worker.state is State.HEALTHY
