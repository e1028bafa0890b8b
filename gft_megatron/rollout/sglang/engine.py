"""Samples from a fleet of SGLang servers. Every leader rank has one of these; the one of rank 0 changes their weights.

The engines need no word from each other: what weights a server has is told by the server itself, and one that has not
the newest is sent nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from gft_megatron.rollout.engine import (
    Completion,
    EngineFailed,
    GenerateRequest,
    RequestAborted,
    RequestRefused,
    RolloutEngine,
)
from gft_megatron.rollout.sglang.calls import Call, Calls
from gft_megatron.rollout.sglang.client import ModelFacts
from gft_megatron.rollout.sglang.fleet import Fleet, HealthLimits, State
from gft_megatron.rollout.sglang.http import FailureKind, Http, Keys, WorkerError
from gft_megatron.rollout.sglang.overseer import Overseer
from gft_megatron.rollout.sglang.routing import choose_worker, prompt_key
from gft_megatron.rollout.sglang.watcher import ProbeLimits
from gft_megatron.rollout.sglang.weight_sync import WeightSync

_ATTEMPTS = 3
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """Seconds, each the most that is waited for something."""

    lost_sec: float = 90.0
    """For any server to serve again; with `HealthLimits.dead_sec`, a run without servers ends in two minutes. While one
    is given weights, or makes tokens and has no room for a trial, the time stands still."""
    request_sec: float = 3600.0
    """For one response, however well its server gets on."""
    abort_sec: float = 2.0
    catch_up_sec: float = 600.0
    """For a server to take weights that it missed."""
    backoff_sec: float = 0.5
    """Before a second try after a server was too busy; then twice that."""


@dataclass(eq=False)
class _Request:
    """What `generate` is at with one request."""

    aborted: bool = False
    waiter: asyncio.Future[None] | None = None
    """For a server that can serve."""
    call: Call | None = None
    failed_on: set[str] = field(default_factory=set)


class SGLangEngine(RolloutEngine):
    """A client of all servers of a run."""

    scope: ClassVar[Literal["rank", "replica"]] = "replica"
    is_reproducible: ClassVar[bool] = False

    def __init__(
        self,
        addresses: Callable[[], Sequence[str]],
        *,
        keys: Keys,
        model: ModelFacts,
        weight_sync: Callable[[Http], WeightSync] | None = None,
        asynchronous: bool = False,
        router_url: str | None = None,
        health: HealthLimits | None = None,
        probes: ProbeLimits | None = None,
        limits: EngineLimits | None = None,
    ) -> None:
        """Nothing is opened before the first `generate` or `update_weights`.

        Args:
            addresses: the servers as of now; asked again and again, since servers may come and go.
            weight_sync: makes what changes the weights, of the engine's connections; None where another engine does.
            asynchronous: weights may change while requests are in flight.
            router_url: of an sglang-router that requests go through, started with --disable-retries: its retries would
                be second samples under one id. Everything else goes straight to the servers. Behind a router it is the
                router that chooses; answers of servers with old weights are still refused, one by one.
        """
        limits = limits or EngineLimits()
        self._model = model
        self._asynchronous = asynchronous
        self._router_url = router_url
        self._limits = limits
        self._http = Http(keys)
        self._weight_sync = None if weight_sync is None else weight_sync(self._http)
        self._fleet = Fleet(health or HealthLimits())
        self._calls = Calls(
            self._http,
            self._fleet,
            model,
            router_url=router_url,
            request_sec=limits.request_sec,
            abort_sec=limits.abort_sec,
        )
        self._overseer = Overseer(
            addresses,
            self._http,
            self._fleet,
            self._calls,
            model,
            catch_up=None if self._weight_sync is None else self._catch_up,
            looked=self._tell_waiters,
            is_needed=lambda: bool(self._requests),
            router_url=router_url,
            probes=probes or ProbeLimits(),
            lost_sec=limits.lost_sec,
        )
        self._requests: dict[str, _Request] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._failures: Counter[str] = Counter()
        self._retries = 0
        self._tokens: Counter[str] = Counter()
        self._sync_sec = 0.0
        self.weight_version = -1

    async def generate(self, request: GenerateRequest) -> Completion:
        """
        Raises:
            RolloutError: as in `RolloutEngine`.
            FleetLost: no server can serve.
        """
        self._model.check(request)
        if self.weight_version < 0:
            raise EngineFailed(request.request_id, "the engine has no weights yet: call update_weights first")
        if self._overseer.failure is not None:
            raise self._overseer.failure
        self._overseer.start()
        assert request.request_id not in self._requests, "a request id that is in flight"
        record = self._requests[request.request_id] = _Request()
        try:
            return replace(await self._try_in_turn(request, record), request_id=request.request_id)
        finally:
            del self._requests[request.request_id]

    async def abort(self, request_ids: Iterable[str] | None = None) -> None:
        names = list(self._requests) if request_ids is None else request_ids
        calls = []
        for record in [self._requests[name] for name in names if name in self._requests]:
            record.aborted = True
            if record.waiter is not None and not record.waiter.done():
                record.waiter.set_result(None)
            if record.call is not None:
                calls.append(record.call)
        await asyncio.gather(*map(self._calls.end, calls))

    async def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """
        Raises:
            ValueError, OSError: as `WeightSync.push`; the tensors are consumed all the same.
        """
        assert self._asynchronous or not self._requests, "update_weights while requests are in flight"
        tensors = iter(named_tensors)
        try:
            self._overseer.start()
            if self._weight_sync is None:
                for _ in tensors:
                    await asyncio.sleep(0)  # requests may be in flight
                self._expect(version)
            else:
                await self._push(self._weight_sync, tensors, version)
        finally:
            for _ in tensors:
                pass

    async def release_memory(self) -> None:
        """Servers on the trainer's GPUs leave it their memory, until they are given the next weights."""
        if self._weight_sync is None:
            return
        self._fleet.paused = True  # until then nobody asks them for a token
        for url, reason in (await self._weight_sync.release_memory(self._fleet.reachable())).items():
            _logger.warning("%s has not released its memory: %s", url, reason)

    async def close(self) -> None:
        await self.abort()
        await self._overseer.close()
        await self._calls.close()
        if self._weight_sync is not None:
            await self._weight_sync.close()
        await self._http.close()

    def figures(self) -> dict[str, float]:
        """Metrics as of now; counts are since the engine was made. To be asked in its event loop."""
        loads = self._overseer.loads()
        states = Counter(worker.state for worker in self._fleet.workers.values())
        return {
            **{f"workers_{state}": float(states[state]) for state in State},
            **{f"tokens/{url.partition('://')[2]}": float(n) for url, n in self._tokens.items()},
            **{f"failures/{kind}": float(n) for kind, n in self._failures.items()},
            "running": float(sum(load.running for load in loads)),
            "queued": float(sum(load.queued for load in loads)),
            "in_flight": float(len(self._calls)),
            "retries": float(self._retries),
            "weight_version": float(self.weight_version),
            "sync_sec": self._sync_sec,
        }

    # Requests

    async def _try_in_turn(self, request: GenerateRequest, record: _Request) -> Completion:
        key = prompt_key(request.prompt_ids)
        attempt = 0
        while True:
            target = await self._place(request.request_id, record, key)
            rid = request.request_id if attempt == 0 else _retry_id(request.request_id, attempt)
            record.call = self._calls.start(target, rid, request, oldest_version=self.weight_version)
            try:
                completion = await self._calls.answer(record.call)
            except RequestAborted as aborted:
                if record.aborted:
                    raise RequestAborted(request.request_id, "aborted", aborted.partial) from None
                error = WorkerError(target, FailureKind.ABORTED, f"request {rid}: the server gave it up")
            except WorkerError as failure:
                error = failure
            else:
                self._tokens[target] += len(completion.token_ids)
                self._overseer.completed(target)
                return completion
            finally:
                record.call = None
            if record.aborted:
                raise RequestAborted(request.request_id, f"aborted ({error})")
            self._failures[error.kind] += 1
            self._overseer.failed(error)
            if error.kind is FailureKind.REFUSED:
                raise RequestRefused(request.request_id, str(error))
            await self._calls.abort(target, rid)
            attempt += 1
            if attempt == _ATTEMPTS:
                raise EngineFailed(request.request_id, f"{_ATTEMPTS} tries failed, the last: {error}")
            record.failed_on.add(target)
            self._retries += 1
            if error.kind is FailureKind.OVERLOADED:
                await asyncio.sleep(self._limits.backoff_sec * attempt)

    async def _place(self, request_id: str, record: _Request, key: bytes) -> str:
        """Wait for a server that can serve."""
        while True:
            if record.aborted:
                raise RequestAborted(request_id, "aborted")
            if self._overseer.failure is not None:
                raise self._overseer.failure
            if servable := self._fleet.servable():
                if self._router_url is not None:
                    return self._router_url
                loads = {url: self._overseer.num_requests(url) for url in servable}
                target = choose_worker(loads, key, record.failed_on)
                assert target is not None
                return target
            record.waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(record.waiter)
            await record.waiter

    def _tell_waiters(self) -> None:
        if self._waiters and (self._overseer.failure is not None or self._fleet.servable()):
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    # Weights

    async def _push(self, weight_sync: WeightSync, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        if self.weight_version < 0:
            await self._overseer.first_answers()
        await self._overseer.stop_catching_up()
        self._fleet.paused = True
        try:
            outcome = await weight_sync.push(
                self._fleet.reachable(), tensors, version, allow_running=self._asynchronous
            )
        finally:
            self._fleet.paused = False
        self._sync_sec = outcome.seconds
        self._expect(version)
        for url in outcome.acknowledged:
            self._fleet.acknowledged(url, str(version), self._now())
        for url, reason in outcome.failed.items():
            _logger.warning("%s did not take weights %d and is left out: %s", url, version, reason)
            self._fleet.rejected(url, reason, self._now())
        self._tell_waiters()

    def _expect(self, version: int) -> None:
        self.weight_version = version
        self._fleet.weights_expected(str(version), self._now())
        self._overseer.look()

    async def _catch_up(self, url: str) -> None:
        assert self._weight_sync is not None
        version = str(self.weight_version)
        reason = "it did not take the newest weights"
        try:
            async with asyncio.timeout(self._limits.catch_up_sec):
                taken = await self._weight_sync.catch_up(url)
        except (WorkerError, TimeoutError) as error:
            taken, reason = False, str(error) or f"no end of a weight update in {self._limits.catch_up_sec:g} s"
        if taken:
            self._fleet.acknowledged(url, version, self._now())
            self._tell_waiters()
        else:
            self._fleet.rejected(url, reason, self._now())

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _retry_id(request_id: str, attempt: int) -> str:
    """A late answer to a try before can then not be taken for this one's."""
    return hashlib.sha256(f"{request_id}/{attempt}".encode()).hexdigest()[:32]
