"""Runs one server: `python -I guard.py PARENT_PID GRACE_SEC COMMAND ...`, its standard output the log. Launcher only.

It stands between trainer and server for three things:
* The server ends when the trainer does, also by kill -9. (PR_SET_PDEATHSIG alone would kill it as soon as the *thread*
  that started it ends; and end-of-file on a pipe is not seen while a forked child of the trainer holds it open.)
* SGLang writes all of its arguments into its log, keys included: they are taken out. They reach the server as a
  `--config` file that is a named pipe: read once, never on a disk, not on a command line.
* Whatever the server leaves behind is removed: its children, which are one process group, and its temporary files.

SIGTERM ends the server and kills it after GRACE_SEC, SIGQUIT kills it at once. Exit status: the server's, 128 + n for
signal n. Only the standard library, and nothing of this package is imported: a node with eight servers has eight.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import BinaryIO

_KEY_FLAGS = {"GFT_SGLANG_API_KEY": "api-key", "GFT_SGLANG_ADMIN_KEY": "admin-api-key"}
_PR_SET_PDEATHSIG = 1
_LONGEST_LINE = 1 << 16  # bytes held back at most


class Redactor:
    """Copies what a server says into its log, without the secrets."""

    def __init__(self, log: BinaryIO, secrets: list[str]) -> None:
        self._log = log
        self._secrets = [secret.encode() for secret in secrets]
        self._held = b""

    def write(self, data: bytes) -> None:
        """Only whole lines go on: a secret may come in two parts."""
        text = self._held + data
        for secret in self._secrets:
            text = text.replace(secret, b"[key]")
        end = text.rfind(b"\n") + 1
        if len(text) - end > _LONGEST_LINE:
            end = len(text) - max(map(len, self._secrets), default=0)
        self._held = text[end:]
        self._put(text[:end])

    def finish(self) -> None:
        """Write what is left, but for the beginning of a secret."""
        text, self._held = self._held, b""
        for secret in self._secrets:
            cut = next((n for n in range(len(secret), 0, -1) if text.endswith(secret[:n])), 0)
            text = text[: len(text) - cut]
        self._put(text + b"\n" if text else b"")

    def _put(self, text: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk is no reason to end the server
            self._log.write(text)


def run(parent: int, grace_sec: float, command: list[str]) -> int:
    """Until the server has ended, or the parent has, or a signal came."""
    try:
        trainer = os.pidfd_open(parent)
    except ProcessLookupError:
        return 1
    if os.getppid() != parent:  # it ended before it could be watched, and its number may be another's by now
        return 1
    signals, on_signal = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, _: os.write(on_signal, bytes([number])))

    keys = {flag: os.environ.pop(name) for name, flag in _KEY_FLAGS.items() if name in os.environ}
    redactor = Redactor(sys.stdout.buffer.raw, list(keys.values()))
    with tempfile.TemporaryDirectory(prefix="gft-sglang-") as folder:  # mode 0700
        config = os.path.join(folder, "keys.yaml")
        if keys:
            os.mkfifo(config, 0o600)
            command = [*command, "--config", config]
        this, libc = os.getpid(), ctypes.CDLL(None)
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # What it creates there by name, sockets among them, it does not remove when it is killed.
            env={**os.environ, "TMPDIR": folder},
            preexec_fn=lambda: _die_with(this, libc),
        )
        if keys:  # JSON is YAML. In a thread: opening the pipe waits for the server to read it.
            threading.Thread(target=_write_once, args=(config, json.dumps(keys)), daemon=True).start()
        _follow(server, redactor, trainer, signals, grace_sec)
        # Not waited for yet, so the number is still the server's.
        os.killpg(server.pid, signal.SIGKILL)
        _copy_rest(server, redactor)
        status = server.wait()
    return status if status >= 0 else 128 - status


def _follow(server: subprocess.Popen, redactor: Redactor, trainer: int, signals: int, grace_sec: float) -> None:
    """Copy output until there is a reason to stop."""
    output, ended = server.stdout.fileno(), os.pidfd_open(server.pid)
    poll = select.poll()
    for descriptor in (output, ended, trainer, signals):
        poll.register(descriptor, select.POLLIN)
    deadline = None
    while True:
        left_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = [descriptor for descriptor, _ in poll.poll(left_ms)]
        if output in ready:
            data = os.read(output, 1 << 16)
            redactor.write(data)
            if not data:
                poll.unregister(output)
        if ended in ready or trainer in ready or deadline is not None and time.monotonic() >= deadline:
            return
        if signals in ready:
            if os.read(signals, 1)[0] == signal.SIGQUIT:
                return
            os.kill(server.pid, signal.SIGTERM)  # Popen.send_signal would wait for it: see `run`
            deadline = deadline or time.monotonic() + grace_sec


def _copy_rest(server: subprocess.Popen, redactor: Redactor) -> None:
    """What is in the pipe. Not until its end: a process that left the group may hold it open."""
    output = server.stdout.fileno()
    while select.select([output], [], [], 0.1)[0] and (data := os.read(output, 1 << 16)):
        redactor.write(data)
    redactor.finish()


def _die_with(parent: int, libc: ctypes.CDLL) -> None:
    """In the server's process, before it is the server: end by SIGKILL when this guard is killed itself."""
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _write_once(path: str, text: str) -> None:
    with open(path, "w") as pipe:
        pipe.write(text)


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
