"""A run whose own samples come from two real servers: what is lost when they die is nothing.

Two ranks under tensor parallelism train GFT on groups of recorded and own answers, drawn one rollout ahead.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from e2e_runs import PROGRAM, error_line, metrics_of, run_tool
from torchrun import kill, start_torchrun

from gft_megatron.groups import GroupKey
from gft_megatron.observe.metrics import read_metrics
from gft_megatron.rollout.bank.ledger import Ledger, ledger_paths, scan, valid_markers
from gft_megatron.rollout.sglang.http import Keys
from gft_megatron.rollout.sglang.keys import key_variables
from gft_megatron.rollout.sglang.launcher import Launcher

STEPS = 11
SAVED = 4
GROUPS = 6


@pytest.fixture(scope="module")
def countdown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("countdown")
    run_tool("prepare_data.py", "countdown", "--output-dir", folder, "--seed", 1)
    return folder


def flags(model: Path, data: Path, run_dir: Path, urls: tuple[str, ...]) -> list[object]:
    return [
        "--hf-checkpoint", model, "--prompt-data", data / "train.jsonl", "--run-dir", run_dir,
        "--rm-type", "examples/countdown_reward.py:score",
        "--seq-length", 32, "--rollout-max-response-len", 6, "--rollout-batch-size", GROUPS,
        "--loss", "gft", "--n-expert", 1, "--n-teacher", 1, "--n-self", 4, "--no-skip-zero-variance",
        "--lr", 1e-3, "--train-iters", STEPS, "--save-interval", SAVED, "--eval-interval", 0,
        "--tensor-model-parallel-size", 2, "--max-staleness", 1,
        "--rollout-engine", "sglang", "--sglang-urls", *urls, "--sglang-lost-timeout-sec", 4,
        "--weight-sync", "distributed",
    ]  # fmt: skip


def until(is_so: Callable[[], bool], process: subprocess.Popen | None = None, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if process is not None and process.poll() is not None:
            out, err = process.communicate()
            raise AssertionError(f"the run ended with status {process.returncode}\n{out[-2000:]}\n{err[-4000:]}")
        assert time.monotonic() < deadline
        time.sleep(0.05)


def num_steps(run_dir: Path) -> int:
    return len(read_metrics(run_dir / "metrics.jsonl"))  # its last line may be half-written at the moment


def ledgers(run_dir: Path) -> list[Ledger]:
    return [scan(path) for path in ledger_paths(run_dir / "bank")]


def trained(run_dir: Path) -> set[GroupKey]:
    """Going by the marks that no resume has undone."""
    return set(valid_markers(ledgers(run_dir)))


def test_both_servers_die_and_nothing_is_lost(
    sglang_launcher: Launcher,
    sglang_workers: tuple[str, str],
    sglang_model: Path,
    sglang_keys: Keys,
    countdown: Path,
    tmp_path: Path,
    monkeypatch,
) -> None:
    for name, value in key_variables(sglang_keys).items():
        monkeypatch.setenv(name, value)
    run_dir = tmp_path / "run"
    arguments = flags(sglang_model, countdown, run_dir, sglang_launcher.urls)
    first = start_torchrun(PROGRAM, *arguments, num_ranks=2)
    try:
        until(lambda: num_steps(run_dir) >= SAVED + 2, first)
        servers = [process for process in psutil.process_iter() if is_server(process, sglang_launcher)]
        assert len(servers) == 2
        for server in servers:
            server.kill()
        out, err = first.communicate(timeout=120)
    finally:
        kill_if_alive(first)
    assert "no SGLang server could serve for 4 s" in error_line(
        subprocess.CompletedProcess(first.args, first.returncode, out, err)
    )
    before = {record["step"]: record for record in metrics_of(run_dir)}
    finished = {key for ledger in ledgers(run_dir) for key in ledger.entries}
    last = max(before)
    assert SAVED + 2 <= last < 2 * SAVED and len(finished) >= (last - SAVED) * GROUPS
    assert all(not ledger.damages for ledger in ledgers(run_dir))

    second = start_torchrun(PROGRAM, *arguments, "--sglang-lost-timeout-sec", 120, num_ranks=2)
    try:
        out, err = second.communicate(timeout=240)
    finally:
        kill_if_alive(second)
    assert second.returncode == 0, err[-4000:]
    after = {record["step"]: record for record in metrics_of(run_dir)}
    assert list(after) == list(range(1, STEPS + 1))
    for step in range(SAVED + 1, last + 1):  # trained on again, from the checkpoint, with the very same groups
        for name in ("train/loss", "train/grad_norm", "rollout/reward_mean", "rollout/response_length_mean_self"):
            assert after[step][name] == before[step][name], (step, name)
        assert after[step]["rollout/groups_restored"] == GROUPS
    # What is behind the oldest checkpoint may have left the ledger.
    assert trained(run_dir) >= {GroupKey(rollout, i) for rollout in range(2 * SAVED, STEPS) for i in range(GROUPS)}

    staleness = [record["rollout/staleness_max"] for record in after.values()]
    assert staleness[0] == 0 and set(staleness[1:]) == {1.0}
    assert after[STEPS]["engine/weight_version"] == STEPS - 1 and after[STEPS]["engine/sync_sec"] > 0
    for path in run_dir.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(key.encode() in content for key in key_variables(sglang_keys).values()), path
    assert not any(key in out + err for key in key_variables(sglang_keys).values())


def is_server(process: psutil.Process, launcher: Launcher) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    ports = {url.rpartition(":")[2] for url in launcher.urls}
    return "sglang.launch_server" in command and "guard.py" not in " ".join(command) and not ports.isdisjoint(command)


def kill_if_alive(process: subprocess.Popen) -> None:
    if process.poll() is None:
        kill(process)
        process.communicate()


def test_servers_are_refused_without_their_key(
    sglang_workers: tuple[str, ...], sglang_model: Path, countdown: Path, tmp_path: Path, monkeypatch
) -> None:
    for name in ("GFT_SGLANG_API_KEY", "GFT_SGLANG_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    arguments = flags(sglang_model, countdown, tmp_path / "run", sglang_workers)
    process = start_torchrun(PROGRAM, *arguments, num_ranks=2)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        kill_if_alive(process)
    line = error_line(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    assert "401" in line and "GFT_SGLANG_API_KEY" in line, line
