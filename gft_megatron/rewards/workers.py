"""A pool of math workers: processes that are killed when they hang, crash or grow, and replaced at the next need."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gft_megatron.rewards.interface import RewardError

_SCRIPT = Path(__file__).with_name("math_worker.py")
_START_TIMEOUT_SEC = 60.0
_POLL_SEC = 0.05
# The parent watches resident memory. Address space is only the backstop for one huge allocation: math-verify swallows
# the MemoryError that it causes and would call the answer wrong.
_ADDRESS_SPACE_FACTOR = 4


class WorkerPool:
    """At most `num_workers` processes, one answer at a time in each. Bound to the event loop that first uses it."""

    def __init__(self, num_workers: int, *, timeout_sec: float, max_memory_bytes: int) -> None:
        assert num_workers > 0
        self._timeout_sec = timeout_sec
        self._max_memory_bytes = max_memory_bytes
        self._idle: asyncio.Queue[_Worker | None] = asyncio.Queue()  # None: to be started
        for _ in range(num_workers):
            self._idle.put_nowait(None)
        self._running: set[_Worker] = set()

    async def are_equal(self, expected: str, readings: Sequence[str]) -> bool:
        """Whether any reading of an answer equals the expected one (math_worker.py).

        Raises:
            RewardError: the worker hung, died or outgrew its memory. Its place is free again at once.
        """
        worker = await self._idle.get()
        try:
            if worker is None or not worker.is_alive:
                worker = await self._start()
            limit_sec = math.ceil(self._timeout_sec) + 1
            worker.send({"expected": expected, "readings": list(readings), "limit_sec": limit_sec})
            reply = await worker.reply(self._timeout_sec, self._max_memory_bytes)
        except BaseException:
            # Also when cancelled: the worker may be in the middle of an answer that nobody waits for.
            if worker is not None:
                self._stop(worker)
            worker = None
            raise
        finally:
            self._idle.put_nowait(worker)
        if "error" in reply:
            raise RewardError("crash", reply["error"])
        return reply["equal"]

    async def close(self) -> None:
        """Kill all workers and wait until they are gone."""
        workers = list(self._running)
        for worker in workers:
            self._stop(worker)
        await asyncio.gather(*(worker.process.wait() for worker in workers))

    async def _start(self) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the script's folder has a math.py, which must not hide Python's
            str(_SCRIPT),
            str(self._max_memory_bytes * _ADDRESS_SPACE_FACTOR),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches the trainer, which then closes the pool
        )
        worker = _Worker(process)
        self._running.add(worker)
        try:
            await worker.reply(_START_TIMEOUT_SEC, self._max_memory_bytes)
        except BaseException:
            self._stop(worker)
            raise
        return worker

    def _stop(self, worker: _Worker) -> None:
        worker.kill()
        self._running.discard(worker)


class _Worker:
    """One process, and the lines that go in and out."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @property
    def is_alive(self) -> bool:
        return self.process.returncode is None

    def send(self, request: dict[str, Any]) -> None:
        # At most three answers of a bounded length (math.py): less than a pipe holds, so this never waits.
        self.process.stdin.write(json.dumps(request, ensure_ascii=False).encode(errors="replace") + b"\n")

    async def reply(self, timeout_sec: float, max_memory_bytes: int) -> dict[str, Any]:
        """The next line, while the process keeps to its limits; RewardError if it does not."""
        deadline = time.monotonic() + timeout_sec
        line = asyncio.ensure_future(self.process.stdout.readline())
        try:
            while not line.done():
                await asyncio.wait({line}, timeout=_POLL_SEC)
                if not line.done() and time.monotonic() > deadline:
                    raise RewardError("timeout", f"no verdict in {timeout_sec:g} s")
                if self._resident_bytes() > max_memory_bytes:
                    raise RewardError("crash", f"the answer took more than {max_memory_bytes} bytes")
        finally:
            line.cancel()
        if not line.result():
            raise RewardError("crash", "the worker process died")
        return json.loads(line.result())

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def _resident_bytes(self) -> int:
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):  # gone: its stdout says so
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
