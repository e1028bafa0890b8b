"""The launcher and its guard, with a server of a few lines in SGLang's place: starts, faults, ends and secrets."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
from launched_stand_in import write_interpreter
from ports import free_ports

from gft_megatron.rollout.sglang import guard, launcher
from gft_megatron.rollout.sglang.http import Keys
from gft_megatron.rollout.sglang.keys import generate_keys, key_variables
from gft_megatron.rollout.sglang.launcher import Launcher, LaunchOptions

KEYS = generate_keys()


def options(folder: Path, fault: str = "", **others) -> LaunchOptions:
    (folder / "config.json").touch()
    settings = {
        "python": write_interpreter(folder),
        "model": folder,
        "device": "cpu",
        "port": free_ports(2),
        "environment": {"FAKE": fault, "PIDS": str(folder / "pids"), "TMPDIR": str(folder)},
        "ready_timeout_sec": 60.0,
    }
    return LaunchOptions(**settings | others)


def processes(folder: Path, starts: int = 1) -> list[list[int]]:
    """Server and child of every start so far; waits until there are so many."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        path = folder / "pids"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if len(lines) >= starts and lines[-1].endswith("\n"):
            return [list(map(int, line.split())) for line in lines]
        time.sleep(0.01)
    raise AssertionError(f"{starts} starts were not seen in a minute: {lines}")


def wait_until_gone(*pids: int) -> None:
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=60)
    assert alive == []


def log_of(folder: Path) -> str:
    (path,) = (folder / "logs").glob("*.log")
    return path.read_text()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(launcher, "_FIRST_BACK_OFF_SEC", 0.01)
    monkeypatch.setattr(launcher, "_PROBE_SEC", 0.02)


def test_start_and_end(tmp_path):
    with Launcher(options(tmp_path, num_workers=2), KEYS, tmp_path / "logs") as fleet:
        urls = fleet.start()
        assert len(set(urls)) == 2 and urls == fleet.urls
        pids = sum(processes(tmp_path, starts=2), [])
        assert all(map(psutil.pid_exists, pids))
    wait_until_gone(*pids)
    # What servers left in their temporary folders is gone with them: the keys' pipe, sockets.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "logs", "pids", "python"]


def test_keys_are_in_no_log_argument_or_environment(tmp_path, monkeypatch):
    for name, value in key_variables(KEYS).items():
        monkeypatch.setenv(name, value)
    with Launcher(options(tmp_path), KEYS, tmp_path / "logs") as fleet:
        fleet.start()
        (pids,) = processes(tmp_path)
        for process in [psutil.Process(pids[0]), *psutil.Process(pids[0]).parents()]:
            assert not any(key in " ".join(process.cmdline()) for key in (KEYS.api, KEYS.admin))
        assert not set(key_variables(KEYS)) & set(psutil.Process(pids[0]).environ())
    log = log_of(tmp_path)
    assert "server_args: {'api-key': '[key]', 'admin-api-key': '[key]'}\n" in log
    assert "\n[key] [key]\n" in log and log.endswith("unfinished \n")
    assert KEYS.api[:20] not in log and KEYS.admin[:20] not in log
    assert KEYS.api not in repr(fleet._servers), "what a failed test or a debugger shows"


def test_the_trainers_own_variables_do_not_reach_a_server(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "kept")
    with Launcher(options(tmp_path, extra_arguments=("--dtype", "bfloat16")), KEYS, tmp_path / "logs") as fleet:
        fleet.start()
    seen = json.loads(next(line for line in log_of(tmp_path).splitlines() if line.startswith("{")))
    assert "HF_HOME" in seen["environment"]
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"} & set(seen["environment"])
    assert seen["arguments"][-4:-1] == ["--dtype", "bfloat16", "--config"]  # of two of a kind, SGLang takes the last


def visible_gpus(tmp_path, **others) -> list[str]:
    fleet = Launcher(
        options(tmp_path, device="cuda", num_workers=2, tensor_parallel_size=2, **others), KEYS, tmp_path / "logs"
    )
    return [server.environment["CUDA_VISIBLE_DEVICES"] for server in fleet._servers]


def test_each_server_has_its_gpus(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(tmp_path) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,5,GPU-x,7")
    assert visible_gpus(tmp_path) == ["1,3", "5,GPU-x"]
    assert visible_gpus(tmp_path, gpus=(4, 5, 6, 7)) == ["4,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    with pytest.raises(ValueError, match="need 4; CUDA_VISIBLE_DEVICES has 2"):
        visible_gpus(tmp_path)


def test_a_server_that_dies_at_once_is_told_with_its_last_words(tmp_path):
    with pytest.raises(ChildProcessError, match=r"(?s)ended with status 1; .*\.log ends with:.*no such model") as error:
        Launcher(options(tmp_path, "die"), KEYS, tmp_path / "logs").start()
    assert KEYS.api[:8] not in str(error.value)


def test_a_server_that_never_gets_ready_is_ended(tmp_path):
    before = psutil.Process().children()
    with pytest.raises(ChildProcessError, match="was not ready after 0.5 s"):
        Launcher(options(tmp_path, "slow", ready_timeout_sec=0.5), KEYS, tmp_path / "logs").start()
    assert psutil.Process().children() == before


def test_a_dead_server_is_started_again(tmp_path, caplog):
    with Launcher(options(tmp_path), KEYS, tmp_path / "logs") as fleet:
        fleet.start()
        (first,) = processes(tmp_path)
        os.kill(first[0], signal.SIGKILL)
        _, second = processes(tmp_path, starts=2)
        wait_until_gone(*first)  # its child too
        fleet.kill(fleet.urls[0])
        third = processes(tmp_path, starts=3)[2]
        wait_until_gone(*second)
        assert all(map(psutil.pid_exists, third))
    wait_until_gone(*third)
    assert [record.getMessage().count("was killed by signal 9") for record in caplog.records] == [1, 1]


def test_a_server_whose_guard_was_killed_ends_and_is_started_again(tmp_path):
    with Launcher(options(tmp_path), KEYS, tmp_path / "logs") as fleet:
        fleet.start()
        ((server, child),) = processes(tmp_path)
        psutil.Process(server).parent().kill()
        processes(tmp_path, starts=2)
        wait_until_gone(server)
        os.kill(child, signal.SIGKILL)  # SGLang's children see to that themselves


def test_a_server_that_dies_again_and_again_is_left_dead(tmp_path, caplog):
    with Launcher(options(tmp_path, max_restarts=2), KEYS, tmp_path / "logs") as fleet:
        fleet.start()
        for starts in (1, 2, 3):
            os.kill(processes(tmp_path, starts)[-1][0], signal.SIGKILL)
        fleet._supervisors[0].join(60)
        assert not fleet._supervisors[0].is_alive()
    assert len(processes(tmp_path)) == 3
    assert "was started 2 times: it is left dead" in caplog.records[-1].getMessage()


def test_a_server_that_cannot_be_started_for_a_while_is_started_when_it_can(tmp_path, caplog):
    with Launcher(options(tmp_path, max_restarts=1000), KEYS, tmp_path / "logs") as fleet:
        fleet.start()
        (server,) = fleet._servers
        log, server.log = server.log, tmp_path / "config.json" / "a file is no folder"
        os.kill(processes(tmp_path)[0][0], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while "could not be started" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        server.log = log
        assert len(processes(tmp_path, starts=2)) == 2


def test_servers_end_with_a_trainer_that_is_killed(tmp_path):
    trainer = os.fork()
    if trainer == 0:
        try:
            Launcher(options(tmp_path), KEYS, tmp_path / "logs").start()
            signal.pause()
        finally:
            os._exit(1)
    (pids,) = processes(tmp_path)
    above = psutil.Process(pids[0]).parent().pid
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    wait_until_gone(*pids, above)


def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            Launcher(options(tmp_path, port=port), KEYS, tmp_path / "logs").start()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "node7"])
@pytest.mark.parametrize("keys", [Keys(), Keys(api=KEYS.api), Keys(admin=KEYS.admin)])
def test_no_server_without_both_keys_listens_to_others(tmp_path, host, keys):
    with pytest.raises(ValueError, match=f"may not listen on {host}.*GFT_SGLANG_ADMIN_KEY"):
        Launcher(options(tmp_path, host=host), keys, tmp_path / "logs")
    Launcher(options(tmp_path, host=host), KEYS, tmp_path / "logs")
    Launcher(options(tmp_path, host="127.0.0.1"), keys, tmp_path / "logs")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"python": Path("no/python")}, "no/python is no Python interpreter"),
        ({"model": Path("no")}, "no has no config.json"),
        (
            {"device": "cuda", "gpus": (0,), "num_workers": 2},
            "2 servers of 1 GPUs each need 2 different ones; given: 0",
        ),
        ({"num_workers": 0}, "0 servers"),
        ({"port": 80}, "port 80"),
        ({"extra_arguments": ("--api-key=s",)}, "--api-key is ours to give"),
    ],
)
def test_wrong_options_are_told(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **wrong)


def test_a_secret_is_taken_out_wherever_the_text_is_cut():
    text = b"first abcdefgh\nsecond abcdefgh, third\nlast abcdef"
    for size in range(1, len(text)):
        log = io.BytesIO()
        redactor = guard.Redactor(log, ["abcdefgh"])
        for start in range(0, len(text), size):
            redactor.write(text[start : start + size])
        redactor.finish()
        assert log.getvalue() == b"first [key]\nsecond [key], third\nlast \n"


def test_a_line_without_end_is_not_held_for_ever():
    log = io.BytesIO()
    redactor = guard.Redactor(log, ["abcdefgh"])
    for _ in range(20_000):
        redactor.write(b"xabcdefgh")
    assert len(redactor._held) <= guard._LONGEST_LINE
    redactor.finish()
    assert log.getvalue() == b"x[key]" * 20_000 + b"\n"
