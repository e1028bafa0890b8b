"""How far a transfer of bytes has come: a bar on a terminal, lines in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import rich.console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gft_megatron.observe.wording import duration

_LINE_SEC = 10.0


@contextmanager
def transfer(title: str, num_bytes: int, stream: TextIO) -> Iterator[Callable[[int], None]]:
    """Show it; the function that is yielded takes bytes that were just done, from any thread."""
    console = rich.console.Console(file=stream, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        lines = _Lines(title, num_bytes, stream)
        yield lines.advance
        lines.say()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=num_bytes)
        yield lambda count: bar.advance(task, count)


class _Lines:
    def __init__(self, title: str, num_bytes: int, stream: TextIO) -> None:
        self._title, self._num_bytes, self._stream = title, num_bytes, stream
        self._done = 0
        self._started = self._said = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if time.monotonic() - self._said >= _LINE_SEC:
                self._said = time.monotonic()
                self.say()

    def say(self) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        left = (self._num_bytes - self._done) * seconds / max(self._done, 1)
        when = f"eta {duration(left)}" if self._done < self._num_bytes else f"in {duration(seconds)}"
        print(
            f"{self._title}: {size(self._done)} of {size(self._num_bytes)}, {size(self._done / seconds)}/s, {when}",
            file=self._stream, flush=True,
        )  # fmt: skip


def size(num_bytes: float) -> str:
    """3.09 GB"""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            break
        num_bytes, unit = num_bytes / 1000, {"B": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
