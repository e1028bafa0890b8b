"""How far the comparison is: a bar and the running jobs on a terminal, a line for each finished job in a log."""

from __future__ import annotations

import sys

from compare.job import Job
from compare.lanes import LANES
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from gft_megatron.observe.wording import duration


class _Tally:
    """Counts jobs, and says how long the rest will take from how long the finished ones took."""

    def __init__(self, jobs: list[Job]) -> None:
        self.total = len(jobs)
        self._left = {job.folder: job.seconds for job in jobs}  # by folder: flags change when the choice is made
        self._measured = self._foreseen = 0.0

    @property
    def done(self) -> int:
        return self.total - len(self._left)

    def found(self, job: Job) -> None:
        self._left.pop(job.folder, None)

    def finished(self, job: Job, seconds: float) -> None:
        self.found(job)
        self._measured += seconds
        self._foreseen += job.seconds

    @property
    def eta(self) -> str:
        pace = self._measured / self._foreseen if self._foreseen else 1.0
        return duration(pace * sum(self._left.values()) / LANES)


class Lines:
    """For a log: each line complete in itself."""

    def __init__(self, jobs: list[Job]) -> None:
        self._tally = _Tally(jobs)

    def started(self, job: Job) -> None:
        pass

    def found(self, job: Job) -> None:
        self._tally.found(job)

    def finished(self, job: Job, seconds: float) -> None:
        self._tally.finished(job, seconds)
        tally = self._tally
        self.say(f"{tally.done}/{tally.total} | {job.folder} in {duration(seconds)} | eta {tally.eta}")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class Bars:
    """For a terminal."""

    def __init__(self, jobs: list[Job]) -> None:
        self._tally = _Tally(jobs)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[eta]}"))
        self._progress = Progress(*columns, console=Console())
        self._all = self._progress.add_task("all", total=len(jobs), eta="")
        self._running: dict[Job, TaskID] = {}
        self._progress.start()

    def started(self, job: Job) -> None:
        self._running[job] = self._progress.add_task(job.folder, total=None, eta="")

    def found(self, job: Job) -> None:
        self._tally.found(job)
        self._show()

    def finished(self, job: Job, seconds: float) -> None:
        self._tally.finished(job, seconds)
        self._progress.remove_task(self._running.pop(job))
        self._show()

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()

    def _show(self) -> None:
        tally = self._tally
        self._progress.update(
            self._all, description=f"{tally.done}/{tally.total}", completed=tally.done, eta=f"eta {tally.eta}"
        )


def build_progress(jobs: list[Job]) -> Lines | Bars:
    """For standard output, whichever it is."""
    return Bars(jobs) if sys.stdout.isatty() else Lines(jobs)
