"""Run jobs side by side, one to a core, each as soon as what it needs is there."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from compare.job import Job, is_finished, record_finished

LANES = 2
_CHECKOUT = Path(__file__).parents[2]
_LAST_LINES = 12
_POLL_SEC = 0.1


class JobFailed(Exception):
    """A command ended with an error: its last lines, and the folder."""


class Watcher(Protocol):
    """Is told what happens."""

    def started(self, job: Job) -> None: ...
    def finished(self, job: Job, seconds: float) -> None: ...
    def found(self, job: Job) -> None:
        """It was finished before."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)


def claim(run_dir: Path) -> None:
    """Make the folder, or recognise one that is ours: what is in it may be replaced.

    Raises:
        ValueError: it holds something else.
    """
    mark = run_dir / "comparison"
    if run_dir.exists() and not mark.exists() and any(run_dir.iterdir()):
        raise ValueError(f"--run-dir {run_dir} holds other files: name a new folder, or one of a comparison")
    run_dir.mkdir(parents=True, exist_ok=True)
    mark.touch()


def run_jobs(jobs: Iterable[Job], run_dir: Path, watcher: Watcher, *, lanes: int = LANES) -> None:
    """Run what is not finished yet.

    Args:
        jobs: with all that they need, each after what it needs.

    Raises:
        JobFailed: the first to fail ends the others.
    """
    jobs = list(jobs)
    urgency = _urgency(jobs)
    done = {job for job in jobs if is_finished(job, run_dir)}
    for job in jobs:
        if job in done:
            watcher.found(job)
    waiting = sorted((job for job in jobs if job not in done), key=lambda job: -urgency[job])
    running: list[_Running] = []
    try:
        while waiting or running:
            ready = [job for job in waiting if done.issuperset(job.needs)]
            for job in ready[: lanes - len(running)]:
                waiting.remove(job)
                watcher.started(job)
                running.append(_Running(job, _start(job, run_dir)))
            time.sleep(_POLL_SEC)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                _check(one, run_dir)
                seconds = time.monotonic() - one.began
                record_finished(one.job, run_dir, seconds)
                done.add(one.job)
                watcher.finished(one.job, seconds)
    finally:
        for one in running:
            _end(one.process)


def _urgency(jobs: list[Job]) -> dict[Job, float]:
    """Seconds from the start of a job to the end of the longest chain that waits for it."""
    chain = dict.fromkeys(jobs, 0.0)
    for job in reversed(jobs):
        chain[job] += job.seconds
        for needed in job.needs:
            chain[needed] = max(chain[needed], chain[job])
    return chain


def _start(job: Job, run_dir: Path) -> subprocess.Popen[bytes]:
    folder = run_dir / job.folder
    if folder.exists():
        shutil.rmtree(folder)  # unfinished, or of another command
    folder.mkdir(parents=True)
    values = {"run": str(run_dir.resolve()), "python": sys.executable, "port": _free_port()}
    command = [argument.format(**values) for argument in job.command]
    with (folder / "log.txt").open("wb") as log:
        # A session of its own: Ctrl-C reaches us alone, and `_end` reaches all that torchrun started.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            cwd=_CHECKOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _check(one: _Running, run_dir: Path) -> None:
    if one.process.returncode:
        folder = run_dir / one.job.folder
        lines = (folder / "log.txt").read_text(errors="replace").splitlines()
        # What torchrun says after the program's own last word helps nobody.
        errors = [number for number, line in enumerate(lines) if line.startswith("error:")]
        shown = lines[: errors[-1] + 1] if errors else lines
        reason = f"{folder}: failed with status {one.process.returncode}; see log.txt there"
        raise JobFailed("\n".join([*shown[-_LAST_LINES:], reason]))


def _end(process: subprocess.Popen[bytes]) -> None:
    for kill in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kill)
            process.wait(timeout=10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
