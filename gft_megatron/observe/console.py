"""What a run says while it runs: lines in a log here, a live view on a terminal in live.py, nothing on other ranks.

A console that cannot be written to (a closed terminal, a full disk) falls silent; it never ends the training.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TextIO

from gft_megatron.observe.wording import duration, inert, phrases, shorten

_SHOWN_CHARACTERS = 240
_STAGE_NEWS_SEC = 10.0
_LINE_TOPICS = ("loss", "reward", "entropy", "rectified", "grad_norm", "lr", "speed", "time", "eval", "trouble")

Progress = Callable[[int], None]


class SampleRow(NamedTuple):
    """One response to show."""

    prompt: str
    response: str
    reward: float


class Console:
    """Says nothing. The console of all ranks but one, and what the other consoles are made from."""

    def info(self, text: str) -> None:
        """A message."""

    def warning(self, text: str) -> None:
        """A message that asks for attention."""

    @contextmanager
    def stage(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Progress]:
        """Long work besides the steps (loading, reading data, evaluating).

        Args:
            total: how many `unit`s there are, where it is known beforehand.

        Yields:
            a function to be told how many are done so far.
        """
        yield lambda done: None

    def doing(self, text: str) -> None:
        """What the run waits for at the moment, told again and again; the next step ends it."""

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of a step, or of an evaluation after it.

        A group of figures (train/, rollout/, ...) that is not given keeps its last values: a rollout's come with the
        first of its steps.
        """

    def show_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """A few responses of the model, made inert: model text cannot control the terminal."""

    def close(self) -> None:
        """Leave the terminal as it was found. The last call; it may come twice."""


def build_console(*, train_iters: int, log_every: int = 1, quiet: bool = False) -> Console:
    """The console for standard output: a live view on a terminal, else a line every `log_every` steps."""
    if quiet:
        return Console()
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        from gft_megatron.observe.live import LiveConsole  # rich is loaded only where it is used

        return LiveConsole(sys.stdout, train_iters=train_iters)
    return LogConsole(sys.stdout, train_iters=train_iters, log_every=log_every)


class Newest:
    """The newest figures of every group, and how long the rest will take."""

    def __init__(self, train_iters: int) -> None:
        self.train_iters = train_iters
        self.step = 0
        self.figures: dict[str, float] = {}
        self._first: tuple[int, float] | None = None

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        self.step = step
        given = {name.partition("/")[0] for name in figures}
        kept = {name: value for name, value in self.figures.items() if name.partition("/")[0] not in given}
        self.figures = {**kept, **figures}
        if self._first is None and not is_evaluation(figures):
            self._first = (step, time.monotonic())

    @property
    def eta(self) -> str:
        """Time to go, at the pace since the first step of this process; empty before the second."""
        if self._first is None or self.step <= self._first[0]:
            return ""
        pace = (time.monotonic() - self._first[1]) / (self.step - self._first[0])
        return duration(pace * max(0, self.train_iters - self.step))


def is_evaluation(figures: Mapping[str, float]) -> bool:
    return any(name.startswith("eval/") for name in figures)


def stage_news(title: str, done: int, total: int | None, unit: str) -> str:
    """reading train.jsonl: 1,200/7,473 rows"""
    if not done and total is None:
        return title
    return f"{title}: {done:,}{'' if total is None else f'/{total:,}'} {unit}".rstrip()


class LogConsole(Console):
    """Short lines for a log file, each complete in itself, so that grep and tail serve."""

    def __init__(self, stream: TextIO, *, train_iters: int, log_every: int = 1) -> None:
        self._stream = stream
        self._newest = Newest(train_iters)
        self._log_every = log_every
        self._last_news: float | None = None

    def info(self, text: str) -> None:
        self._print(text)

    def warning(self, text: str) -> None:
        self._print(f"warning: {text}")

    @contextmanager
    def stage(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Progress]:
        started = last_news = time.monotonic()
        done = 0

        def progress(so_far: int) -> None:
            nonlocal done, last_news
            done = so_far
            now = time.monotonic()
            if now - last_news >= _STAGE_NEWS_SEC:
                last_news = now
                self._print(f"{stage_news(title, done, total, unit)} ...")

        self._print(f"{title} ...")
        yield progress
        self._print(f"{stage_news(title, done, total, unit)} in {duration(time.monotonic() - started)}")

    def doing(self, text: str) -> None:
        now = time.monotonic()
        if self._last_news is None:
            self._last_news = now
        if now - self._last_news >= _STAGE_NEWS_SEC:
            self._last_news = now
            self._print(f"{text} ...")

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        self._last_news = None
        self._newest.update(step, figures)
        train_iters = self._newest.train_iters
        if is_evaluation(figures):
            self._print(" | ".join([f"eval {step}/{train_iters}", *self._said(figures)]))
        elif step % self._log_every == 0 or step == train_iters:
            eta = self._newest.eta
            trained = {name: value for name, value in self._newest.figures.items() if not name.startswith("eval/")}
            line = [f"step {step}/{train_iters}", *self._said(trained), *([f"eta {eta}"] if eta else [])]
            self._print(" | ".join(line))

    def show_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        for row in rows:
            prompt, response = (shorten(inert(text), _SHOWN_CHARACTERS) for text in (row.prompt, row.response))
            self._print(f"sample {step} | reward {row.reward:.2f} | {prompt} | {response}")

    @staticmethod
    def _said(figures: Mapping[str, float]) -> list[str]:
        words = phrases(figures)
        return [words[topic] for topic in _LINE_TOPICS if topic in words]

    def _print(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        line = inert(text).encode(encoding, "backslashreplace").decode(encoding)
        try:
            print(line, file=self._stream, flush=True)
        except (OSError, ValueError):
            self._print = lambda text: None  # type: ignore[method-assign]
