"""Start SGLang servers on this machine, and keep them until Ctrl-C.

For trying things out, and for machines that only generate; a training run can start its own. On a CPU:

    bash tools/sglang_cpu.sh
    python tools/make_tiny_model.py --output tiny
    python tools/sglang_worker.py --model tiny --device cpu --num-workers 2

The keys are those of GFT_SGLANG_API_KEY and GFT_SGLANG_ADMIN_KEY, or new ones, which are written to a file that only
you can read: source it where the training starts.
"""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from gft_megatron.rollout.sglang.addresses import announce
from gft_megatron.rollout.sglang.keys import keys_for_launch, read_keys, write_keys
from gft_megatron.rollout.sglang.launcher import Launcher, LaunchOptions


@dataclass(frozen=True, kw_only=True)
class Workers:
    """SGLang servers on this machine."""

    model: Path
    """Hugging Face folder to serve."""
    python: Path = Path(".venv-sglang/bin/python")
    """Interpreter of the environment that has SGLang."""
    num_workers: int = 1
    """Servers."""
    tensor_parallel_size: int = 1
    """GPUs of each server."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where the model runs."""
    host: str = "127.0.0.1"
    """Address to listen on: of this machine, as the training's machines reach it."""
    port: int = 30000
    """Of the first server; the others take those that follow."""
    discovery: Path | None = None
    """Folder on a shared disk to write the addresses to, for the training to find."""
    log_folder: Path = Path("runs/sglang")
    """Where each server's log goes."""
    keys_file: Path = Path.home() / ".cache/gft_megatron/sglang_keys"
    """Where new keys are written to."""
    sglang_arguments: str = ""
    """More flags for SGLang, in one word: --sglang-arguments="--mem-fraction-static 0.9 --enable-metrics"."""


def serve(settings: Workers) -> None:
    """Start, say where, wait for Ctrl-C or SIGTERM, stop."""
    keys = keys_for_launch()
    options = LaunchOptions(
        python=settings.python,
        model=settings.model,
        num_workers=settings.num_workers,
        tensor_parallel_size=settings.tensor_parallel_size,
        device=settings.device,
        host=settings.host,
        port=settings.port,
        extra_arguments=tuple(shlex.split(settings.sglang_arguments)),
    )
    with Launcher(options, keys, settings.log_folder) as launcher:
        print(f"starting {options.num_workers} (logs in {settings.log_folder}) ...", flush=True)
        urls = launcher.start()
        if keys != read_keys():
            write_keys(settings.keys_file, keys)
            print(f"keys: source {settings.keys_file}")
        print(f"serving: {' '.join(urls)}", flush=True)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        announced = None if settings.discovery is None else announce(settings.discovery, urls)
        stop.wait()
        if announced is not None:
            announced.unlink(missing_ok=True)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        serve(tyro.cli(Workers, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
