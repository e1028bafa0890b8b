"""Two real SGLang servers for the session, on a CPU, started through the launcher by the first test that wants them.

They come from the environment that tools/sglang_cpu.sh makes at .venv-sglang; GFT_SGLANG_PYTHON names another's
interpreter. Without one, the tests are skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_ports
from programs import CHECKOUT, load_program

from gft_megatron.rollout.sglang.dialect import probe_dialect
from gft_megatron.rollout.sglang.http import Http, Keys, WorkerError
from gft_megatron.rollout.sglang.keys import generate_keys
from gft_megatron.rollout.sglang.launcher import Launcher, LaunchOptions


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    """The interpreter that has SGLang."""
    python = Path(os.environ.get("GFT_SGLANG_PYTHON", CHECKOUT / ".venv-sglang/bin/python"))
    if not python.exists():
        pytest.skip(f"no SGLang at {python}: bash tools/sglang_cpu.sh, or GFT_SGLANG_PYTHON")
    return python


@pytest.fixture(scope="session")
def sglang_keys() -> Keys:
    return generate_keys()


@pytest.fixture(scope="session")
def sglang_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2 with random weights and the tokenizer of the quickstart."""
    folder = tmp_path_factory.mktemp("sglang") / "model"
    tiny = load_program("tools/make_tiny_model.py")
    tiny.write_tiny_model(
        tiny.TinyModel(
            output=folder,
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            max_position_embeddings=2048,
            tie_embeddings=False,
        )
    )
    return folder


@pytest.fixture(scope="session")
def sglang_launcher(
    sglang_python: Path, sglang_model: Path, sglang_keys: Keys, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Launcher]:
    """Runs two servers. `kill(url)` and SIGKILL are allowed: the servers come back."""
    logs = tmp_path_factory.mktemp("sglang_logs")
    for attempt in range(3):
        options = LaunchOptions(
            python=sglang_python,
            model=sglang_model,
            num_workers=2,
            device="cpu",
            port=free_ports(2),
            ready_timeout_sec=600,
            max_restarts=20,
        )
        launcher = Launcher(options, sglang_keys, logs)
        try:
            launcher.start()
            break
        except OSError:  # somebody else may have taken a port in the meantime
            if attempt == 2:
                raise
    with launcher:
        yield launcher


@pytest.fixture
def sglang_workers(sglang_launcher: Launcher, sglang_keys: Keys) -> tuple[str, str]:
    """Their addresses. A server that the test before has killed is waited for."""
    asyncio.run(_wait_until_ready(sglang_launcher.urls, sglang_keys))
    return sglang_launcher.urls


async def _wait_until_ready(urls: tuple[str, ...], keys: Keys) -> None:
    async with Http(keys) as http, asyncio.timeout(300):
        for url in urls:
            while True:
                with contextlib.suppress(WorkerError):
                    if await (await probe_dialect(http, url)).is_ready(http, url):
                        break
                await asyncio.sleep(0.2)
