"""Samples from a fleet of SGLang servers. Every leader rank has one of these; the one of rank 0 changes their weights.

The engines need no word from each other: what weights a server has is told by the server itself, and one that has not
the newest is sent nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from gft_megatron.rollout.engine import (
    Completion,
    EngineFailed,
    GenerateRequest,
    RequestAborted,
    RequestRefused,
    RolloutEngine,
    SamplingParams,
)
from gft_megatron.rollout.sglang import client
from gft_megatron.rollout.sglang.client import ModelFacts, PartialCompletion
from gft_megatron.rollout.sglang.fleet import Fleet, HealthLimits, State
from gft_megatron.rollout.sglang.http import FailureKind, Http, Keys, WorkerError
from gft_megatron.rollout.sglang.routing import choose_worker, prompt_key
from gft_megatron.rollout.sglang.watcher import Hands, ProbeLimits, Watcher

_ATTEMPTS = 3
_ABORTS_AT_ONCE = 64
_logger = logging.getLogger(__name__)


class FleetLost(Exception):
    """No server can serve any more: the run ends. What was collected is kept."""


class SyncOutcome(Protocol):
    @property
    def acknowledged(self) -> Sequence[str]: ...

    @property
    def failed(self) -> Mapping[str, str]: ...

    @property
    def seconds(self) -> float: ...


class Syncs(Protocol):
    """What changes the servers' weights."""

    async def push(
        self, urls: Sequence[str], named_tensors: Iterable[tuple[str, Tensor]], version: int, *, allow_running: bool
    ) -> SyncOutcome: ...

    async def catch_up(self, url: str) -> bool: ...

    async def release_memory(self, urls: Sequence[str]) -> Mapping[str, str]: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """Seconds, each the most that is waited for something."""

    lost_sec: float = 90.0
    """For any server to serve again; with `HealthLimits.dead_sec`, a run without servers ends in two minutes."""
    request_sec: float = 3600.0
    """For one response, however well its server gets on."""
    abort_sec: float = 2.0
    catch_up_sec: float = 600.0
    """For a server to take weights that it missed."""
    backoff_sec: float = 0.5
    """Before a second try after a server was too busy; then twice that."""


@dataclass(eq=False)
class _Call:
    """One try of one request."""

    rid: str
    target: str
    task: asyncio.Task[Completion]
    stop: WorkerError | None = None
    """Why this side broke it off."""

    def break_off(self, kind: FailureKind, reason: str) -> None:
        if not self.task.done() and self.stop is None:
            self.stop = WorkerError(self.target, kind, f"request {self.rid}: {reason}")
            self.task.cancel()


@dataclass(eq=False)
class _Request:
    """What `generate` is at with one request."""

    aborted: bool = False
    waiter: asyncio.Future[None] | None = None
    """For a server that can serve."""
    call: _Call | None = None
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
        weight_sync: Callable[[Http], Syncs] | None = None,
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
        self._addresses = addresses
        self._keys = keys
        self._model = model
        self._make_weight_sync = weight_sync
        self._weight_sync: Syncs | None = None
        self._asynchronous = asynchronous
        self._router_url = router_url
        self._probes = probes or ProbeLimits()
        self._limits = limits or EngineLimits()
        self._fleet = Fleet(health or HealthLimits())
        self._http: Http | None = None
        self._requests: dict[str, _Request] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._calls: dict[str, dict[str, _Call]] = {}  # by target, then by rid
        self._watchers: dict[str, Watcher] = {}
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._overseer: asyncio.Task[None] | None = None
        self._aborting: set[asyncio.Task[None]] = set()
        self._abort_slots = asyncio.Semaphore(_ABORTS_AT_ONCE)
        self._fatal: Exception | None = None
        self._trials = 0
        self._failures: Counter[str] = Counter()
        self._retries = 0
        self._tokens: Counter[str] = Counter()
        self._sync_sec = 0.0
        self.weight_version = -1

    async def generate(self, request: GenerateRequest) -> Completion:
        """
        Raises:
            RolloutError: as in `RolloutEngine`; an aborted request that has tokens raises `PartialCompletion`.
            FleetLost: no server can serve.
        """
        self._model.check(request)
        if self.weight_version < 0:
            raise EngineFailed(request.request_id, "the engine has no weights yet: call update_weights first")
        self._start()
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
        await asyncio.gather(*map(self._end_call, calls))

    async def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """
        Raises:
            FleetLost, ValueError: as `generate`; the tensors are consumed all the same.
        """
        assert self._asynchronous or not self._requests, "update_weights while requests are in flight"
        self._open()
        if self._weight_sync is None:
            for _ in named_tensors:
                await asyncio.sleep(0)  # requests may be in flight
            self._expect(version)
            return
        await self._first_answers()
        await asyncio.gather(*(watcher.stop_catching_up() for watcher in self._watchers.values()))
        self._fleet.paused = True
        try:
            outcome = await self._weight_sync.push(
                self._fleet.reachable(), named_tensors, version, allow_running=self._asynchronous
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

    async def release_memory(self) -> None:
        """Servers on the trainer's GPUs leave it their memory, until they are given the next weights."""
        if self._weight_sync is None:
            return
        self._fleet.paused = True  # until then nobody asks them for a token
        for url, reason in (await self._weight_sync.release_memory(self._fleet.reachable())).items():
            _logger.warning("%s has not released its memory: %s", url, reason)

    async def close(self) -> None:
        await self.abort()
        tasks = [*self._watching.values(), *([] if self._overseer is None else [self._overseer])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._aborting:
            await asyncio.wait(self._aborting)
        if self._weight_sync is not None:
            await self._weight_sync.close()
        if self._http is not None:
            await self._http.close()

    def figures(self) -> dict[str, float]:
        """Metrics as of now; counts are since the engine was made. To be asked in its event loop."""
        loads = [watcher.load for watcher in self._watchers.values() if watcher.load is not None]
        states = Counter(worker.state for worker in self._fleet.workers.values())
        return {
            **{f"workers_{state}": float(states[state]) for state in State},
            **{f"tokens/{url.partition('://')[2]}": float(n) for url, n in self._tokens.items()},
            **{f"failures/{kind}": float(n) for kind, n in self._failures.items()},
            "running": float(sum(load.running for load in loads)),
            "queued": float(sum(load.queued for load in loads)),
            "in_flight": float(sum(len(calls) for calls in self._calls.values())),
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
            record.call = self._call(target, rid, request)
            try:
                completion = await self._answer(record.call)
            except PartialCompletion as partial_completion:
                if record.aborted:
                    whole_id = replace(partial_completion.completion, request_id=request.request_id)
                    raise PartialCompletion(whole_id) from None
                error = WorkerError(target, FailureKind.ABORTED, f"request {rid}: the server gave it up")
            except WorkerError as failure:
                error = failure
            else:
                self._tokens[target] += len(completion.token_ids)
                self._fleet.completed(target, self._now())
                if target in self._watchers:  # a router has none
                    self._watchers[target].completed()
                return completion
            finally:
                record.call = None
            if record.aborted:
                raise RequestAborted(request.request_id, f"aborted ({error})")
            self._failures[error.kind] += 1
            self._failed(error)
            if error.kind is FailureKind.REFUSED:
                raise RequestRefused(request.request_id, str(error))
            await self._abort_rid(target, rid)
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
            if self._fatal is not None:
                raise self._fatal
            if servable := self._fleet.servable():
                if self._router_url is not None:
                    return self._router_url
                loads = {url: len(self._calls.get(url, ())) + self._watchers[url].others for url in servable}
                target = choose_worker(loads, key, record.failed_on)
                assert target is not None
                return target
            record.waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(record.waiter)
            await record.waiter

    def _call(self, target: str, rid: str, request: GenerateRequest) -> _Call:
        assert self._http is not None
        answer = client.generate(
            self._http,
            target,
            request,
            self._model,
            rid=rid,
            oldest_version=self.weight_version,
            timeout_sec=self._limits.request_sec,
        )
        call = _Call(rid, target, asyncio.ensure_future(answer))
        self._calls.setdefault(target, {})[rid] = call
        return call

    async def _answer(self, call: _Call) -> Completion:
        """Cancelled, it leaves nothing on the server."""
        try:
            return await call.task
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if call.stop is not None and not (this is not None and this.cancelling()):
                raise call.stop from None
            aborting = asyncio.ensure_future(self._abort_rid(call.target, call.rid))
            self._aborting.add(aborting)
            aborting.add_done_callback(self._aborting.discard)
            raise
        finally:
            del self._calls[call.target][call.rid]

    async def _end_call(self, call: _Call) -> None:
        """Abort it; the server answers with what it has drawn, and one that does not is not waited for."""
        await self._abort_rid(call.target, call.rid)
        if not call.task.done():
            await asyncio.wait([call.task], timeout=self._limits.abort_sec)
        if not call.task.done():  # its abort may have come before the request itself
            call.break_off(FailureKind.TIMED_OUT, "no answer to its abort")
            await self._abort_rid(call.target, call.rid)

    async def _abort_rid(self, target: str, rid: str) -> None:
        # Behind a router nobody knows which server has a request.
        targets = list(self._fleet.workers) if target == self._router_url else [target]
        await asyncio.gather(*(self._abort_at(url, rid) for url in targets))

    async def _abort_at(self, url: str, rid: str) -> None:
        assert self._http is not None
        worker = self._fleet.workers.get(url)
        if worker is not None and worker.state is State.DEAD and worker.misses:  # each would wait for nothing
            return
        async with self._abort_slots:
            try:
                await client.abort(self._http, url, rid, timeout_sec=self._limits.abort_sec)
            except WorkerError as error:  # of a server that has died there is nothing left to abort
                _logger.debug("abort: %s", error)

    def _failed(self, error: WorkerError) -> None:
        before = self._fleet.state(error.url)
        self._fleet.failed(error.url, error.kind, str(error), self._now())
        if before is State.HEALTHY and self._fleet.state(error.url) is not before and error.url in self._watchers:
            self._watchers[error.url].wake()

    def _tell_waiters(self) -> None:
        if self._waiters and (self._fatal is not None or self._fleet.servable()):
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def _break_off(self, target: str, kind: FailureKind, reason: str) -> None:
        for call in list(self._calls.get(target, {}).values()):
            call.break_off(kind, reason)

    # Weights

    def _expect(self, version: int) -> None:
        self.weight_version = version
        self._fleet.weights_expected(str(version), self._now())
        for watcher in self._watchers.values():
            watcher.wake()

    async def _first_answers(self) -> None:
        """A run's first weights go to servers that may have been started together with it."""
        while self.weight_version < 0 and self._fatal is None:
            if not any(worker.state is State.STARTING for worker in self._fleet.workers.values()):
                return
            await asyncio.sleep(self._probes.every_sec / 5)

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

    # Servers

    def _start(self) -> None:
        if self._fatal is not None:
            raise self._fatal
        self._open()

    def _open(self) -> None:
        if self._http is None:
            self._http = Http(self._keys)
            if self._make_weight_sync is not None:
                self._weight_sync = self._make_weight_sync(self._http)
            try:
                self._list_workers()
            except ValueError as error:  # told by the next `generate`: whoever updates weights has a collective to end
                self._fatal = error
            self._overseer = asyncio.ensure_future(self._guarded(self._oversee()))

    def _list_workers(self) -> None:
        assert self._http is not None
        for url in self._fleet.listed(self._addresses(), self._now()):
            self._watching.pop(url).cancel()
            del self._watchers[url]
            self._break_off(url, FailureKind.UNREACHABLE, "its server is no longer listed")
        for url in self._fleet.workers:
            if url not in self._watchers:
                hands = Hands(
                    own_requests=lambda url=url: len(self._calls.get(url, ())),
                    break_off=lambda reason, url=url: self._break_off(url, FailureKind.NO_PROGRESS, reason),
                    try_out=partial(self._try_out, url),
                    catch_up=None if self._weight_sync is None else partial(self._catch_up, url),
                    looked=self._tell_waiters,
                )
                self._watchers[url] = Watcher(url, self._http, self._fleet, hands, self._probes)
                self._watching[url] = asyncio.ensure_future(self._guarded(self._watchers[url].run()))

    async def _guarded(self, watch: Coroutine[Any, Any, None]) -> None:
        """What ends a watch has to end the run: requests would wait for ever."""
        try:
            await watch
        except Exception as error:
            self._fatal = self._fatal or error
            self._tell_waiters()
            for target in self._calls:  # nobody watches them any longer
                self._break_off(target, FailureKind.NO_PROGRESS, f"the engine ended: {error}")

    async def _oversee(self) -> None:
        """What concerns all servers: which there are, whether there is hope, whether anything moves behind a router."""
        hopeless_for = stuck_for = 0.0
        marks: list[object] = []
        while True:
            await asyncio.sleep(self._probes.every_sec)
            self._list_workers()
            hopeless = self._fleet.hopeless(self._now()) and not self._fleet.paused and self._requests
            hopeless_for = hopeless_for + self._probes.every_sec if hopeless else 0.0
            if hopeless_for >= self._limits.lost_sec:
                raise FleetLost(
                    f"no SGLang server could serve for {self._limits.lost_sec:g} s: {self._fleet.describe()}. "
                    f"Start them again, then this run: it goes on from its last checkpoint"
                )
            if self._router_url is not None:
                before, marks = marks, [w.load and w.load.mark for w in self._watchers.values()]
                still = marks == before and not self._fleet.paused and self._calls.get(self._router_url)
                stuck_for = stuck_for + self._probes.every_sec if still else 0.0
                if stuck_for >= self._fleet.limits.dead_sec:
                    self._break_off(self._router_url, FailureKind.NO_PROGRESS, "no server behind it made a token")

    async def _try_out(self, url: str) -> None:
        """One token, straight from the server. It shows that tokens come of it, and what its log-probs are of.

        Raises:
            ValueError: they are not of softmax(logits / temperature).
        """
        self._trials += 1
        rid = hashlib.sha256(f"{id(self)}/{url}/{self._trials}".encode()).hexdigest()[:32]
        end = min(self._model.eos_token_ids)
        request = GenerateRequest(rid, (end,), SamplingParams(1, temperature=client.FLAT))
        try:
            completion = await self._answer(self._call(url, rid, request))
        except PartialCompletion:
            return
        except WorkerError as error:
            self._failed(error)
            return
        if not client.is_uniform(completion.log_probs, self._model.vocab_size):
            raise ValueError(
                f"{url}: at a temperature at which all of {self._model.vocab_size} tokens are alike, the log-prob of "
                f"one is {completion.log_probs[0]:.3f}. Log-probs have to be of softmax(logits / temperature): start "
                f"the server without SGLANG_RETURN_ORIGINAL_LOGPROB, and with the model of --hf-checkpoint"
            )
        self._fleet.completed(url, self._now())
        self._tell_waiters()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _retry_id(request_id: str, attempt: int) -> str:
    """A late answer to a try before can then not be taken for this one's."""
    return hashlib.sha256(f"{request_id}/{attempt}".encode()).hexdigest()[:32]
