"""The live view of a run on a terminal: a progress bar, the newest figures, and messages that scroll by above.

It is drawn when there is news, by whoever brings it: a thread that draws could hold a lock at the moment in which the
checkpoint writer forks, and the child would wait for that lock for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

import rich.console
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gft_megatron.observe.console import Console, Newest, Progress, SampleRow, is_evaluation, stage_news
from gft_megatron.observe.wording import duration, inert, phrases, shorten

_SHOWN_CHARACTERS = 400
_REDRAW_SEC = 0.1
_ROWS = {
    "loss": ("loss", "entropy", "rectified"),
    "reward": ("reward",),
    "update": ("grad_norm", "lr"),
    "speed": ("speed", "time"),
    "trouble": ("trouble",),
}


class LiveConsole(Console):
    """Draws on a terminal."""

    def __init__(self, stream: TextIO, *, train_iters: int) -> None:
        self._newest = Newest(train_iters)
        self._last_eval = ""
        self._stage = ""
        self._last_drawn = 0.0
        # Without markup, "[bold]" in a text of the model or in a file name is only that text.
        self._console = rich.console.Console(file=stream, markup=False, highlight=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._view)
        self._is_broken = False
        self._try(self._live.start)

    def info(self, text: str) -> None:
        self._say(inert(text))

    def warning(self, text: str) -> None:
        self._say(Text.assemble(("warning: ", "bold yellow"), inert(text)))

    @contextmanager
    def stage(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Progress]:
        started = time.monotonic()
        done = 0

        def progress(so_far: int) -> None:
            nonlocal done
            done = so_far
            self._stage = inert(stage_news(title, done, total, unit))
            self._draw()

        progress(0)
        try:
            yield progress
        finally:
            self._stage = ""
        self.info(f"{stage_news(title, done, total, unit)} in {duration(time.monotonic() - started)}")

    def doing(self, text: str) -> None:
        self._stage = inert(text)
        self._draw()

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        self._stage = ""
        self._newest.update(step, figures)
        if is_evaluation(figures):
            self._last_eval = f"step {step}  {phrases(figures).get('eval', '')}"
        self._draw()

    def show_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        table = Table(
            "reward", "prompt", "response", title=f"samples at step {step}", title_justify="left", expand=True
        )
        table.columns[0].justify = "right"
        table.columns[2].ratio = 2
        for row in rows:
            texts = (shorten(inert(text), _SHOWN_CHARACTERS) for text in (row.prompt, row.response))
            table.add_row(f"{row.reward:.2f}", *texts)
        self._say(table)

    def close(self) -> None:
        if self._live.is_started:
            self._try(self._live.stop)

    def _view(self) -> RenderableType:
        """What stands at the bottom of the terminal."""
        newest = self._newest
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        eta = f"eta {newest.eta}" if newest.eta else ""
        bar = ProgressBar(total=max(newest.train_iters, 1), completed=newest.step)
        head.add_row(Text(f"step {newest.step}/{newest.train_iters}", "bold"), bar, Text(eta, "cyan"))

        words = phrases({name: value for name, value in newest.figures.items() if not name.startswith("eval/")})
        body = Table.grid(padding=(0, 2))
        body.add_column(style="dim", no_wrap=True)
        body.add_column()
        for title, topics in _ROWS.items():
            text = "   ".join(words[topic].removeprefix(f"{title} ") for topic in topics if topic in words)
            if text:
                body.add_row(title, Text(text, "red" if title == "trouble" else ""))
        if self._last_eval:
            body.add_row("eval", Text(self._last_eval, "green"))
        if self._stage:
            body.add_row("now", Text(self._stage, "cyan"))
        return Group(head, body)

    def _say(self, text: RenderableType) -> None:
        self._try(lambda: self._console.print(text))
        self._try(self._live.refresh)  # print repeats the view as it was drawn last

    def _draw(self) -> None:
        now = time.monotonic()
        if now - self._last_drawn >= _REDRAW_SEC:
            self._last_drawn = now
            self._try(self._live.refresh)

    def _try(self, draw: Callable[[], None]) -> None:
        if self._is_broken:
            return
        try:
            draw()
        except (OSError, ValueError):
            self._is_broken = True
