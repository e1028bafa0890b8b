"""An event loop in a thread of its own, so that samples are drawn while the training thread is busy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_WATCH_SEC = 0.25


class BackgroundLoop:
    """Runs coroutines for another thread."""

    def __init__(self, on_start: Callable[[], None] | None = None) -> None:
        """
        Args:
            on_start: called in the thread first (to choose its CUDA device, which every thread has of its own). What
                it raises is raised here.
        """
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
        self._thread.start()
        if on_start is not None:
            try:
                self.run(_call(on_start))
            except BaseException:
                self.close()
                raise

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start it. Cancelling the future cancels the coroutine."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, future: Future[T], watch: Callable[[], None] | None = None) -> T:
        """Its result, or its exception. An interrupt (Ctrl-C) meanwhile cancels it; `close` waits for its end.

        Args:
            watch: called a few times a second, in the calling thread.
        """
        try:
            while True:
                try:
                    return future.result(timeout=_WATCH_SEC if watch is not None else None)
                except TimeoutError:
                    if future.done():  # it was the coroutine's own
                        return future.result()
                    assert watch is not None
                    watch()
        except BaseException:
            future.cancel()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.wait(self.submit(work))

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Hold the thread still, where it holds no lock."""
        is_held, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            is_held.set()
            go_on.wait()

        self._loop.call_soon_threadsafe(hold)
        is_held.wait()
        try:
            yield
        finally:
            go_on.set()

    def close(self) -> None:
        """Cancel what still runs, wait for it, end the thread."""
        if not self._thread.is_alive():
            return
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _call(function: Callable[[], None]) -> None:
    function()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
