"""What the servers have to do for this process: one try of one request is one call, and none is left behind.

Whoever gives a call up has it aborted on its server too, whether that answers or not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from gft_megatron.rollout.engine import Completion, GenerateRequest
from gft_megatron.rollout.sglang import client
from gft_megatron.rollout.sglang.client import ModelFacts
from gft_megatron.rollout.sglang.fleet import Fleet, State
from gft_megatron.rollout.sglang.http import FailureKind, Http, WorkerError

_ABORTS_AT_ONCE = 64
_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Call:
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


class Calls:
    """All calls of one engine, by the URL that they were sent to: a server's, or a router's."""

    def __init__(
        self,
        http: Http,
        fleet: Fleet,
        model: ModelFacts,
        *,
        router_url: str | None,
        request_sec: float,
        abort_sec: float,
    ) -> None:
        """
        Args:
            fleet: whose servers are asked to abort what went through the router.
            request_sec: the most that one call takes.
            abort_sec: the most that is waited for the answer to an abort, and then for the call's own.
        """
        self._http = http
        self._fleet = fleet
        self._model = model
        self._router_url = router_url
        self._request_sec = request_sec
        self._abort_sec = abort_sec
        self._open: dict[str, dict[str, Call]] = {}  # by target, then by rid
        self._aborting: set[asyncio.Task[None]] = set()
        self._abort_slots = asyncio.Semaphore(_ABORTS_AT_ONCE)

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    def at(self, target: str) -> AbstractSet[str]:
        """Their ids."""
        return self._open.get(target, {}).keys()

    def start(self, target: str, rid: str, request: GenerateRequest, *, oldest_version: int) -> Call:
        """Send a request; `answer` has to be awaited."""
        answer = client.generate(
            self._http,
            target,
            request,
            self._model,
            rid=rid,
            oldest_version=oldest_version,
            timeout_sec=self._request_sec,
        )
        call = Call(rid, target, asyncio.ensure_future(answer))
        self._open.setdefault(target, {})[rid] = call
        return call

    async def answer(self, call: Call) -> Completion:
        """Cancelled, it leaves nothing on the server.

        Raises:
            RequestAborted, WorkerError, ValueError: as `client.generate`; also what it was broken off for.
        """
        try:
            return await call.task
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if call.stop is not None and not (this is not None and this.cancelling()):
                raise call.stop from None
            aborting = asyncio.ensure_future(self.abort(call.target, call.rid))
            self._aborting.add(aborting)
            aborting.add_done_callback(self._aborting.discard)
            raise
        finally:
            calls = self._open[call.target]
            del calls[call.rid]
            if not calls:  # servers come and go: their addresses too
                del self._open[call.target]

    async def end(self, call: Call) -> None:
        """Abort it; the server answers with what it has drawn, and one that does not is not waited for."""
        await self.abort(call.target, call.rid)
        if not call.task.done():
            await asyncio.wait([call.task], timeout=self._abort_sec)
        if not call.task.done():  # its abort may have come before the request itself
            call.break_off(FailureKind.TIMED_OUT, "no answer to its abort")
            await self.abort(call.target, call.rid)

    async def abort(self, target: str, rid: str) -> None:
        """Have it given up where it is."""
        # Behind a router nobody knows which server has a request.
        targets = list(self._fleet.workers) if target == self._router_url else [target]
        await asyncio.gather(*(self._abort_at(url, rid) for url in targets))

    def break_off(self, target: str, kind: FailureKind, reason: str) -> None:
        """End all of a server's calls with this failure."""
        for call in list(self._open.get(target, {}).values()):
            call.break_off(kind, reason)

    def break_off_all(self, kind: FailureKind, reason: str) -> None:
        for target in list(self._open):
            self.break_off(target, kind, reason)

    async def close(self) -> None:
        """Wait until the servers were told of all that was cancelled."""
        while self._aborting:
            await asyncio.wait(self._aborting)

    async def _abort_at(self, url: str, rid: str) -> None:
        worker = self._fleet.workers.get(url)
        if worker is not None and worker.state is State.DEAD and worker.misses:  # each would wait for nothing
            return
        async with self._abort_slots:
            try:
                await client.abort(self._http, url, rid, timeout_sec=self._abort_sec)
            except WorkerError as error:  # of a server that has died there is nothing left to abort
                _logger.debug("abort: %s", error)
