"""Two hosts with networks of their own train as one host does: the recipe, run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from e2e_runs import PROGRAM, metrics_of
from torchrun import ROOT, torchrun

# Gloo adds up in an order of its own for each number of ranks, and these are the same: so are the bits.
COMPARED = ("train/loss", "train/grad_norm", "rollout/reward_mean", "train/num_tokens")


def two_hosts(*flags: object, ranks: int, **environment: str) -> str:
    """The output of examples/two_hosts.sh, which leaves nothing behind."""
    done = subprocess.run(
        ["bash", "examples/two_hosts.sh", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "RANKS": str(ranks), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode == 77:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    "ranks, layout",
    [
        pytest.param(1, ["--use-distributed-optimizer"], id="replicas"),
        pytest.param(2, ["--tensor-model-parallel-size", 2], id="tensor-inside", marks=pytest.mark.on_request),
    ],
)
def test_same_steps_as_on_one_host(flags, tmp_path, ranks, layout):
    flags = [*flags, "--train-iters", 3, *layout]
    output = two_hosts(*flags, "--run-dir", tmp_path / "two", "--save-interval", 3, ranks=ranks)
    sent = [int(number) for number in re.findall(r"host \d: received \d+ bytes, sent (\d+)", output)]
    assert len(sent) == 3 and min(sent[:2]) > 100_000, output[-500:]  # gradients crossed the switch
    assert (tmp_path / "two" / "checkpoints" / "iter_0000003" / "run_state.json").exists()
    assert not [
        process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(process.info["cmdline"])
    ]
    done = torchrun(PROGRAM, *flags, "--run-dir", tmp_path / "one", num_ranks=2 * ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert len(one) == 3
    assert [{name: step[name] for name in COMPARED} for step in two] == [
        {name: step[name] for name in COMPARED} for step in one
    ]


@pytest.mark.on_request
def test_a_server_on_a_third_host(flags, toy, tmp_path):
    """Requests, weights and gradients, each from another address than loopback."""
    python = Path(os.environ.get("GFT_SGLANG_PYTHON", ROOT / ".venv-sglang/bin/python"))
    if not python.exists():
        pytest.skip(f"no SGLang at {python}: bash tools/sglang_cpu.sh, or GFT_SGLANG_PYTHON")
    worker = [
        sys.executable, "tools/sglang_worker.py", "--model", toy / "model", "--python", python, "--device", "cpu",
        "--host", "10.77.0.3", "--log-folder", tmp_path / "sglang",
    ]  # fmt: skip
    output = two_hosts(
        *flags, "--train-iters", 2, "--rollout-engine", "sglang", "--sglang-urls", "http://10.77.0.3:30000",
        "--run-dir", tmp_path / "run", ranks=1, WORKER=shlex.join(map(str, worker)),
        GFT_SGLANG_API_KEY="a" * 32, GFT_SGLANG_ADMIN_KEY="b" * 32,
    )  # fmt: skip
    received = re.findall(r"host \d: received (\d+) bytes", output)
    assert len(received) == 3 and int(received[2]) > 10_000, output[-500:]  # host 3 heard the prompts
    steps = metrics_of(tmp_path / "run")
    assert len(steps) == 2
    # What the server says of its tokens is what the trainer finds, before and after new weights.
    assert all(step["train/log_prob_gap_mean"] < 1e-4 for step in steps)
    assert all(step["rollout/failed_samples"] == 0 for step in steps)
