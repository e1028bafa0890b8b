"""Start a script on several ranks, as a user would, and bound it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def torchrun(
    script: Path | str, *arguments: object, num_ranks: int, timeout_sec: float = 300
) -> subprocess.CompletedProcess:
    """Run to the end and return output and exit status; on time-out kill every rank and raise."""
    process = start_torchrun(script, *arguments, num_ranks=num_ranks)
    try:
        out, err = process.communicate(timeout=timeout_sec)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        raise AssertionError(f"{script} did not end within {timeout_sec} s\n{out[-3000:]}\n{err[-3000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_torchrun(script: Path | str, *arguments: object, num_ranks: int) -> subprocess.Popen:
    """Start without waiting."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--nnodes", "1"]
    # Port 0: the launcher takes a free one, so that test runs side by side do not meet.
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    return subprocess.Popen(
        [*launcher, *rendezvous, str(script), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and every rank (each is in a session of its own): nobody gets to clean up."""
    launcher = psutil.Process(process.pid)
    for victim in [launcher, *launcher.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


@contextlib.contextmanager
def stopped(process: subprocess.Popen) -> Iterator[None]:
    """SIGSTOP to the launcher and every rank: the disk is as SIGKILL would leave it. They go on afterwards."""
    launcher = psutil.Process(process.pid)
    halted: list[psutil.Process] = []
    while running := [p for p in [launcher, *launcher.children(recursive=True)] if p not in halted]:
        for one in running:  # a rank may have started a process since it was listed
            with contextlib.suppress(psutil.NoSuchProcess):
                one.suspend()
            halted.append(one)
    try:
        yield
    finally:
        for one in halted:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.resume()
