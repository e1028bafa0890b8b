"""Start SGLang servers on this machine, start them again when they die, and leave none behind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from gft_megatron.rollout.sglang import guard
from gft_megatron.rollout.sglang.dialect import Dialect, probe_dialect
from gft_megatron.rollout.sglang.http import FailureKind, Http, Keys, WorkerError
from gft_megatron.rollout.sglang.keys import is_loopback, key_variables, refuse_open_server

_log = logging.getLogger(__name__)

_PROBE_SEC = 0.25
_FIRST_BACK_OFF_SEC = 1.0
_LONGEST_BACK_OFF_SEC = 60.0
_SETTLED_SEC = 600.0
"""A server that ran for so long has shown that it can: its restarts are forgotten."""
_TAIL_BYTES, _TAIL_LINES = 4000, 8
# Asked to end, a server looks every 5 s, then gives its GPU memory back. On a CPU it may as well be killed.
_GRACE_SEC = {"cuda": 30.0, "cpu": 0.0}
_OURS = ("--config", "--api-key", "--admin-api-key", "--host", "--port", "--model-path", "--device")

# Of the trainer's own processes: torch takes a few of them for its own even where it is told otherwise.
_NOT_FOR_SERVERS = ("MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_", "TORCH_NCCL_ASYNC_ERROR_HANDLING")
_NOT_FOR_SERVERS_EXACTLY = {"RANK", "WORLD_SIZE", "PYTHONPATH", "PYTHONHOME", "CUDA_DEVICE_MAX_CONNECTIONS"}


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What to start on one machine."""

    python: Path
    """The interpreter of an environment with SGLang: not the trainer's, whose torch is another."""
    model: Path
    """Hugging Face folder: configuration, tokenizer and the weights to begin with."""
    num_workers: int = 1
    """Servers."""
    tensor_parallel_size: int = 1
    """GPUs of each server."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where the model runs."""
    gpus: tuple[int, ...] = ()
    """GPUs to divide among the servers, in order, as nvidia-smi counts them; none: those of CUDA_VISIBLE_DEVICES, or
    0, 1, ... On a CPU it means nothing."""
    host: str = "127.0.0.1"
    """Address to listen on, and to be reached at."""
    port: int = 30000
    """Of the first server; the others take those that follow."""
    extra_arguments: tuple[str, ...] = ()
    """More flags for SGLang; they win over ours."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """More variables for SGLang; they win over the trainer's."""
    ready_timeout_sec: float = 1800.0
    """For the first start: reading the weights, compiling, recording CUDA graphs."""
    max_restarts: int = 5
    """Restarts of one server, since it last ran for ten minutes, until it is left dead."""

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.tensor_parallel_size < 1:
            raise ValueError(
                f"{self.num_workers} servers of {self.tensor_parallel_size} GPUs each: both have to be 1 or more"
            )
        if not os.access(self.python, os.X_OK):
            raise ValueError(
                f"{self.python} is no Python interpreter: give the one of an environment with SGLang; "
                "tools/sglang_cpu.sh makes one for CPUs"
            )
        if not (self.model / "config.json").is_file():
            raise ValueError(f"{self.model} has no config.json: SGLang starts from a Hugging Face folder")
        needed = self.num_workers * self.tensor_parallel_size
        if self.gpus and self.device == "cuda" and len(set(self.gpus)) != needed:
            raise ValueError(
                f"{self.num_workers} servers of {self.tensor_parallel_size} GPUs each need {needed} different ones; "
                f"given: {', '.join(map(str, self.gpus))}"
            )
        if not 1024 <= self.port <= 65536 - self.num_workers:
            raise ValueError(f"port {self.port} with {self.num_workers} servers: ports go from 1024 to 65535")
        ours = [argument for argument in self.extra_arguments if argument.partition("=")[0] in _OURS]
        if ours:
            raise ValueError(f"{ours[0].partition('=')[0]} is ours to give to SGLang: keys come by the environment")


@dataclass(eq=False)
class _Server:
    """One server, over all its starts."""

    url: str
    port: int
    command: list[str]
    environment: dict[str, str] = field(repr=False)  # the keys are in it
    log: Path
    process: subprocess.Popen | None = None
    """Of its guard (guard.py), which ends when it does."""
    started: float = 0.0
    """By time.monotonic."""


class Launcher:
    """The servers of one machine. They end with `close`, and with this process however it ends."""

    def __init__(self, options: LaunchOptions, keys: Keys, log_folder: Path) -> None:
        """
        Args:
            log_folder: what each server says is appended to HOST_PORT.log there, without the keys.

        Raises:
            ValueError: servers without keys that others could reach, or fewer GPUs than they need.
        """
        refuse_open_server(options.host, keys)
        self._options = options
        self._keys = keys
        self._servers = [_server(options, keys, index, log_folder) for index in range(options.num_workers)]
        self._closing = threading.Event()
        self._starting = threading.Lock()
        self._supervisors: list[threading.Thread] = []

    @property
    def urls(self) -> tuple[str, ...]:
        """Of all servers, dead or alive: a server comes back at its own address."""
        return tuple(server.url for server in self._servers)

    def start(self) -> tuple[str, ...]:
        """Start all servers side by side and wait until each takes requests. Not to be called in an event loop.

        Raises:
            ChildProcessError: a server ended, or was not ready in time; none is left running.
            OSError: a port is taken, or the address is none of this machine's that others reach.
        """
        for server in self._servers:
            _refuse_bad_address(self._options.host, server.port)
        try:
            for server in self._servers:
                self._spawn(server)
            asyncio.run(self._wait_until_ready())
        except BaseException:
            self.close()
            raise
        for server in self._servers:
            thread = threading.Thread(target=self._supervise, args=(server,), name=f"sglang-{server.port}", daemon=True)
            thread.start()
            self._supervisors.append(thread)
        return self.urls

    def kill(self, url: str) -> None:
        """Kill a server that hangs. It is started again, as any that dies."""
        for server in self._servers:
            if server.url == url and server.process is not None:
                server.process.send_signal(signal.SIGQUIT)

    def close(self) -> None:
        """End all servers. Safe to call twice."""
        with self._starting:  # whatever is being started is there to be ended
            self._closing.set()
        running = [server.process for server in self._servers if server.process is not None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _GRACE_SEC[self._options.device] + 10.0
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()  # takes the server with it
                process.wait()
        for thread in self._supervisors:
            thread.join()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spawn(self, server: _Server) -> bool:
        with self._starting:
            if self._closing.is_set():
                return False
            server.log.parent.mkdir(parents=True, exist_ok=True)
            grace = str(_GRACE_SEC[self._options.device])
            with server.log.open("ab", buffering=0) as log:
                log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(server.command)}\n".encode())
                server.process = subprocess.Popen(
                    [sys.executable, "-I", guard.__file__, str(os.getpid()), grace, *server.command],
                    env=server.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for the trainer, which then ends its servers
                )
            server.started = time.monotonic()
        return True

    async def _wait_until_ready(self) -> None:
        async with Http(self._keys) as http:
            await asyncio.gather(*(self._wait_for(http, server) for server in self._servers))

    async def _wait_for(self, http: Http, server: _Server) -> None:
        dialect: Dialect | None = None
        last: WorkerError | None = None
        while server.process.poll() is None:
            try:
                dialect = dialect or await probe_dialect(http, server.url)
                if await dialect.is_ready(http, server.url):
                    return
            except WorkerError as error:
                if error.kind is FailureKind.REFUSED:
                    raise ChildProcessError(f"a server that is not ours answers at {error}") from error
                last = error
            if time.monotonic() - server.started > self._options.ready_timeout_sec:
                raise ChildProcessError(
                    f"SGLang at {server.url} was not ready after {self._options.ready_timeout_sec:g} s "
                    f"({last or 'it answers, but takes no requests'}); {_end_of(server.log)}"
                )
            await asyncio.sleep(_PROBE_SEC)
        raise ChildProcessError(f"SGLang at {server.url} {_how_it_ended(server)}; {_end_of(server.log)}")

    def _supervise(self, server: _Server) -> None:
        restarts = 0
        while True:
            server.process.wait()
            if self._closing.is_set():
                return
            if time.monotonic() - server.started > _SETTLED_SEC:
                restarts = 0
            if restarts == self._options.max_restarts:
                _log.error(
                    "SGLang at %s %s, and was started %d times: it is left dead. %s",
                    server.url, _how_it_ended(server), restarts, _end_of(server.log),
                )  # fmt: skip
                return
            back_off = min(_LONGEST_BACK_OFF_SEC, _FIRST_BACK_OFF_SEC * 2**restarts)
            _log.warning(
                "SGLang at %s %s; it is started again in %g s. Its log: %s",
                server.url, _how_it_ended(server), back_off, server.log,
            )  # fmt: skip
            restarts += 1
            if self._closing.wait(back_off):
                return
            try:
                if not self._spawn(server):
                    return
            except OSError as error:  # no room for its log, or for a process: that may change
                _log.warning("SGLang at %s could not be started: %s", server.url, error)
                server.started = time.monotonic()


def _server(options: LaunchOptions, keys: Keys, index: int, log_folder: Path) -> _Server:
    port = options.port + index
    host = options.host.strip("[]")
    # A server on all addresses is reached by the name of its machine.
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return _Server(
        url=f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}",
        port=port,
        command=_command(options, host, port),
        environment=_environment(options, keys, index),
        log=log_folder / f"{socket.gethostname()}_{port}.log",
    )


def _command(options: LaunchOptions, host: str, port: int) -> list[str]:
    where = [] if options.device == "cuda" else _ON_CPU
    return [
        *(str(options.python), "-m", "sglang.launch_server", "--model-path", str(options.model)),
        *("--host", host, "--port", str(port), "--tp-size", str(options.tensor_parallel_size)),
        *("--device", options.device, "--skip-server-warmup", "--log-level-http", "warning"),
        *where,
        *options.extra_arguments,
    ]


# The only back ends that are plain PyTorch; and a cache that does not take a part of all memory there is.
_ON_CPU = [
    *("--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--disable-overlap-schedule"),
    *("--dtype", "float32", "--max-total-tokens", "16384", "--max-running-requests", "64", "--sleep-on-idle"),
]


def _environment(options: LaunchOptions, keys: Keys, index: int) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_FOR_SERVERS_EXACTLY and not name.startswith(_NOT_FOR_SERVERS)
    }
    if options.device == "cuda":
        size, num = options.tensor_parallel_size, options.num_workers
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        gpus = list(options.gpus) or visible or list(range(num * size))
        if len(gpus) < num * size:
            raise ValueError(
                f"{num} servers of {size} GPUs each need {num * size}; CUDA_VISIBLE_DEVICES has {len(gpus)}"
            )
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus[index * size : (index + 1) * size]))
    return {**kept, **options.environment, **key_variables(keys)}


def _refuse_bad_address(host: str, port: int) -> None:
    family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    if is_loopback(address[0]) and not is_loopback(host):
        raise OSError(f"{host} is {address[0]} here, which others cannot reach: give this machine's address instead")
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from None


def _how_it_ended(server: _Server) -> str:
    status = server.process.returncode
    if status < 0:
        return f"lost its guard to signal {-status}"
    return f"was killed by signal {status - 128}" if status > 128 else f"ended with status {status}"


def _end_of(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join([f"{log} ends with:", *lines[-_TAIL_LINES:]])
