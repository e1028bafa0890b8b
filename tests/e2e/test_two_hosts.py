"""Two hosts with networks of their own train as one host does: the recipe, run."""

import os
import re
import subprocess
import sys

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
        timeout=300,
    )
    if done.returncode == 77:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    "ranks, layout",
    [
        pytest.param(1, ["--use-distributed-optimizer"], id="replicas"),
        pytest.param(2, ["--tensor-model-parallel-size", 2], id="tensor-inside", marks=pytest.mark.slow),
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
