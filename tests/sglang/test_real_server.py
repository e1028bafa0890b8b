"""What the launcher, the keys and the dialect rely on, shown by the servers themselves."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from ports import free_ports
from programs import CHECKOUT

from gft_megatron.rollout.sglang.addresses import Discovery
from gft_megatron.rollout.sglang.dialect import Dialect, probe_dialect, weight_version
from gft_megatron.rollout.sglang.http import FailureKind, Http, Keys, WorkerError
from gft_megatron.rollout.sglang.launcher import Launcher
from gft_megatron.rollout.sglang.loads import read_load

ADMIN_CALLS = {
    "/update_weights_from_disk": {"model_path": "nowhere", "weight_version": "9"},
    "/init_weights_update_group": {
        "master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2, "group_name": "g",
        "backend": "gloo",
    },
    "/update_weights_from_distributed": {"names": [], "dtypes": [], "shapes": [], "group_name": "g"},
    "/update_weights_from_tensor": {"serialized_named_tensors": []},
    "/begin_weight_update": {},
    "/end_weight_update": {},
    "/update_weight_version": {"new_version": "9", "abort_all_requests": False},
    "/release_memory_occupation": {},
    "/pause_generation": {"mode": "retract"},
    "/abort_request": {"abort_all": True},
    "/flush_cache": {},
}  # fmt: skip
GENERATE = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}


def talk(keys: Keys, conversation: Callable[[Http], Awaitable]):
    async def all_of_it():
        async with Http(keys) as http:
            return await conversation(http)

    return asyncio.run(all_of_it())


def refusal(keys: Keys, url: str, path: str, body: dict) -> str:
    with pytest.raises(WorkerError) as error:
        talk(keys, lambda http: http.call(url, path, body, timeout_sec=20, admin=path in ADMIN_CALLS))
    assert error.value.kind is FailureKind.REFUSED
    return str(error.value)


def test_nobody_changes_weights_without_the_second_key(sglang_workers, sglang_keys):
    first, second = sglang_workers
    before = talk(sglang_keys, lambda http: weight_version(http, first))
    for path, body in ADMIN_CALLS.items():
        for keys in (Keys(), Keys(api=sglang_keys.api), Keys(admin="x" * 64)):
            assert "answered 401" in refusal(keys, first, path, body), path
    assert "answered 401" in refusal(Keys(admin=sglang_keys.admin), second, "/generate", GENERATE)

    async def with_both(http: Http):
        assert await weight_version(http, first) == before != "9"
        await http.call(first, "/update_weight_version", {"new_version": "9"}, timeout_sec=20, admin=True)
        assert await weight_version(http, first) == "9"
        answer = await http.call(first, "/generate", GENERATE, timeout_sec=60)
        assert len(answer["output_ids"]) == 2 and answer["meta_info"]["weight_version"] == "9"
        await http.call(first, "/update_weight_version", {"new_version": before}, timeout_sec=20, admin=True)

    talk(sglang_keys, with_both)
    # With the key, it is the request itself that is wrong.
    assert "answered 400" in refusal(sglang_keys, first, *list(ADMIN_CALLS.items())[0])


def test_dialect_and_counts(sglang_workers, sglang_keys):
    async def ask(http: Http):
        for url in sglang_workers:
            dialect = await probe_dialect(http, url)
            assert dialect == Dialect("0.5.23", needs_begin_end=True, has_ready=True)
            assert await dialect.is_ready(http, url)
            assert await Dialect("0.5.19", needs_begin_end=False, has_ready=False).is_ready(http, url)
            load = await read_load(http, url, timeout_sec=10)
            assert (load.running, load.queued) == (0, 0)
        url = sglang_workers[0]
        body = {"rid": "f" * 32, **GENERATE, "sampling_params": {"max_new_tokens": 1900, "ignore_eos": True}}
        long = asyncio.create_task(http.call(url, "/generate", body, timeout_sec=120))
        while (await read_load(http, url, timeout_sec=10)).running == 0:
            assert not long.done()
        await http.call(url, "/abort_request", {"rid": "f" * 32}, timeout_sec=20, admin=True)
        assert (await long)["meta_info"]["finish_reason"]["type"] == "abort"

    talk(sglang_keys, ask)


def test_no_key_is_in_a_log_an_argument_or_a_servers_environment(sglang_launcher, sglang_keys):
    logs = [server.log for server in sglang_launcher._servers]
    everything = "".join(path.read_text() for path in logs)
    assert everything.count("'admin_api_key': '[key]'") >= 2  # SGLang would have written it
    processes = [psutil.Process(server.process.pid) for server in sglang_launcher._servers]
    servers = [child for guard in processes for child in guard.children(recursive=True)]
    assert len(servers) >= 6
    everything += " ".join(" ".join(process.cmdline()) for process in processes + servers)
    everything += " ".join(" ".join(process.environ().values()) for process in servers)
    assert sglang_keys.api not in everything and sglang_keys.admin not in everything


def test_a_killed_server_comes_back_with_the_weights_it_began_with(sglang_launcher: Launcher, sglang_keys):
    url, server = sglang_launcher.urls[1], sglang_launcher._servers[1]
    before = psutil.Process(server.process.pid).children(recursive=True)

    async def name_version(http: Http):
        await http.call(url, "/update_weight_version", {"new_version": "7"}, timeout_sec=20, admin=True)
        assert await weight_version(http, url) == "7"

    async def wait_until_it_answers(http: Http) -> str:
        while True:
            try:
                return await weight_version(http, url)
            except WorkerError as error:
                assert error.kind in (FailureKind.UNREACHABLE, FailureKind.BROKEN_OFF, FailureKind.TIMED_OUT)
            await asyncio.sleep(0.1)

    talk(sglang_keys, name_version)
    os.kill(before[0].pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs(before, timeout=60)
    assert alive == []
    assert talk(sglang_keys, lambda http: asyncio.wait_for(wait_until_it_answers(http), 300)) == "default"


@pytest.mark.on_request  # test_sglang_launcher.py has it with a stand-in for the server
def test_a_server_ends_with_a_trainer_that_is_killed(sglang_python: Path, sglang_model: Path, tmp_path: Path):
    settings = {
        "--python": sglang_python,
        "--model": sglang_model,
        "--device": "cpu",
        "--port": free_ports(1),
        "--discovery": tmp_path / "workers",
        "--log-folder": tmp_path / "logs",
        "--keys-file": tmp_path / "keys",
    }
    command = [
        sys.executable,
        CHECKOUT / "tools/sglang_worker.py",
        *(word for pair in settings.items() for word in pair),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GFT_SGLANG_")}
    tool = subprocess.Popen(list(map(str, command)), cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        found = Discovery(tmp_path / "workers")
        deadline = time.monotonic() + 300
        while not found.urls():
            assert tool.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        assert found.urls() == (f"http://127.0.0.1:{settings['--port']}",)
        family = psutil.Process(tool.pid).children(recursive=True)
        assert any("sglang::scheduler" in process.name() for process in family)
    finally:
        tool.kill()
        output, _ = tool.communicate()
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    key = (tmp_path / "keys").read_text().split("GFT_SGLANG_API_KEY=")[1].split()[0]
    assert key not in output and f"source {tmp_path / 'keys'}" in output
