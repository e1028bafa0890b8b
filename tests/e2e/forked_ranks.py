"""Ranks of a run that start in a moment, so that they can be killed often: forked from a process that has imported all.

Each rank tells which stage of the loop it enters and leaves, so that a test knows what it kills.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest
from torchrun import ROOT

_STAGES = ("_collect", "_update", "_save")


class ForkedRun:
    """The ranks of one run; a context that ends them."""

    def __init__(
        self,
        flags: Sequence[object],
        *,
        num_ranks: int,
        log: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        context = _fork_server()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._stages, told = context.Pipe(duplex=False)
        self._ranks = [
            context.Process(
                target=_rank,
                args=(
                    rank,
                    num_ranks,
                    port,
                    list(map(str, flags)),
                    str(log),
                    dict(environment),
                    told if rank == 0 else None,
                ),
            )  # fmt: skip
            for rank in range(num_ranks)
        ]
        for rank in self._ranks:
            rank.start()
        told.close()
        self.stage: str | None = None
        """That rank 0 is in, as far as it was heard of; None between two."""

    def __enter__(self) -> ForkedRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._stages.close()

    def next_stage(self, timeout_sec: float = 120) -> str | None:
        """Wait until rank 0 enters a stage; None: it has ended."""
        deadline = time.monotonic() + timeout_sec
        while time.monotonic() < deadline:
            if not wait([self._stages], timeout=deadline - time.monotonic()):
                break
            if not self.hear():
                return None
            if self.stage is not None:
                return self.stage
        raise AssertionError(f"no stage began within {timeout_sec} s")

    def hear(self) -> bool:
        """Take in one message of rank 0; False: there is none any more."""
        try:
            self.stage = self._stages.recv()
        except EOFError:
            return False
        return True

    def kill(self) -> str | None:
        """SIGKILL to every rank and whatever it has started. Returns the stage that rank 0 was in."""
        victims = []
        for rank in self._ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(rank.pid)
                process.suspend()
                victims += [process, *process.children(recursive=True)]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        for rank in self._ranks:
            rank.join()
        while self._stages.poll() and self.hear():
            pass
        return self.stage

    def exit_statuses(self) -> list[int | None]:
        """Wait for the end of all ranks."""
        for rank in self._ranks:
            rank.join(timeout=120)
        return [rank.exitcode for rank in self._ranks]


def _fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imported_ranks"])
    # It has no import path but this one, and does without what it does not find.
    paths = [*map(str, (Path(__file__).parent, ROOT)), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        forkserver.ensure_running()
    return context


def _rank(
    rank: int,
    num_ranks: int,
    port: int,
    flags: list[str],
    log: str,
    environment: dict[str, str],
    told: Connection | None,
) -> None:
    output = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    assert "imported_ranks" in sys.modules
    os.environ.update(
        environment,
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    from imported_ranks import loop, main

    if told is not None:
        for name in _STAGES:
            setattr(loop, name, _telling(told, name.removeprefix("_"), getattr(loop, name)))
    sys.argv = ["pretrain_gft.py", *flags]
    main.main()


def _telling(told: Connection, name: str, stage: Callable) -> Callable:
    def call(*arguments: object) -> object:
        told.send(name)
        try:
            return stage(*arguments)
        finally:
            told.send(None)

    return call
