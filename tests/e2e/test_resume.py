"""A run that is killed and started again with the same command equals one that was left alone, to the last bit."""

import json
import resource
import shutil
import time
from pathlib import Path

import pytest
from e2e_runs import PROGRAM, error_line, metrics_of, short_run
from torchrun import start_torchrun, stopped, torchrun

LAYOUTS = {
    "tensor": ["--tensor-model-parallel-size", 2],
    "data, distributed optimizer": ["--use-distributed-optimizer"],
}
# What is the same in both runs only if weights, optimizer, schedule, data order and sampling all went on as before.
COMPARED = (
    "train/loss", "train/nll", "train/grad_norm", "train/lr", "train/num_tokens", "train/log_prob_gap_mean",
    "rollout/reward_mean", "rollout/response_length_mean_self",
)  # fmt: skip
NUM_STEPS = 8


@pytest.fixture(scope="module")
def common_flags(toy, tmp_path_factory):
    few = tmp_path_factory.mktemp("data") / "few.jsonl"  # the prompt store has to fit under the limit of a full disk
    few.write_text("".join((toy / "data" / "train.jsonl").open().readlines()[:50]))
    return [
        *short_run(toy), "--prompt-data", few, "--train-iters", NUM_STEPS, "--save-interval", 2,
        "--lr-decay-style", "cosine", "--lr-warmup-iters", 4,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(common_flags, tmp_path_factory) -> dict[str, tuple[list, Path]]:
    """Of each layout: the steps of a whole run, and its folder as a kill in step 5 or in the save before leaves it."""
    runs = {}
    for name, layout in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("runs")
        process = start_torchrun(PROGRAM, *common_flags, *layout, "--run-dir", folder / "whole", num_ranks=2)
        wait_for_step(folder / "whole", 4, process)
        with stopped(process):
            shutil.copytree(folder / "whole", folder / "cut")
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-4000:]
        expected = metrics_of(folder / "whole")
        assert len(expected) == NUM_STEPS and len(metrics_of(folder / "cut")) < NUM_STEPS
        runs[name] = expected, folder / "cut"
    return runs


def wait_for_step(run_dir, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        log = run_dir / "metrics.jsonl"
        if log.exists() and any(json.loads(line)["step"] >= step for line in log.read_text().splitlines()):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came: {process.stderr.read()[-2000:]}")


def check_equal(got, expected):
    assert [record["step"] for record in got] == list(range(1, NUM_STEPS + 1))
    for one, other in zip(expected, got, strict=True):
        assert {key: one.get(key) for key in COMPARED} == {key: other.get(key) for key in COMPARED}, one["step"]


def test_killed_run_goes_on_bit_for_bit(common_flags, runs, tmp_path):
    name = "data, distributed optimizer"
    expected, cut = runs[name]
    shutil.copytree(cut, tmp_path / "run")
    done = torchrun(PROGRAM, *common_flags, *LAYOUTS[name], "--run-dir", tmp_path / "run", num_ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resuming from" in done.stdout
    check_equal(metrics_of(tmp_path / "run"), expected)


def test_full_disk_in_a_save_keeps_the_checkpoint_before(common_flags, runs, tmp_path):
    """Killed, started again, stopped by a full disk, started again: still the same run."""
    expected, cut = runs["tensor"]
    shutil.copytree(cut, tmp_path / "run")
    flags = [*common_flags, *LAYOUTS["tensor"], "--run-dir", tmp_path / "run"]
    checkpoints = tmp_path / "run" / "checkpoints"
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    saved = int(tracker.read_text())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # inherited: no file can grow beyond it
    try:
        done = torchrun(PROGRAM, *flags, num_ranks=2, timeout_sec=120)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = error_line(done)
    assert "could not write the checkpoint" in line and f"iter_{saved + 2:07}" in line and "MiB are free" in line
    assert not (checkpoints / f"iter_{saved + 2:07}").exists()
    assert int(tracker.read_text()) == saved
    done = torchrun(PROGRAM, *flags, num_ranks=2)
    assert done.returncode == 0 and f"iter_{saved:07}" in done.stdout, done.stderr[-4000:]
    assert not list(checkpoints.glob("*.partial")) and int(tracker.read_text()) == NUM_STEPS
    check_equal(metrics_of(tmp_path / "run"), expected)


def test_checkpoint_loads_under_another_layout(common_flags, runs, tmp_path):
    """A sharded optimizer of two replicas goes on under TP2 and PP2: the next losses agree up to rounding."""
    name = "data, distributed optimizer"
    _, cut = runs[name]
    losses = []
    for layout in ([], ["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2]):
        run_dir = tmp_path / "-".join(["resumed", *map(str, layout)])
        # Recorded responses only: own samples depend on the engine's share of the prompts, hence on the layout.
        done = torchrun(
            PROGRAM, *common_flags, *LAYOUTS[name], "--run-dir", run_dir, "--load", cut / "checkpoints",
            "--save-interval", 0, *layout, "--n-self", 0, num_ranks=2,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        losses.append([record["train/loss"] for record in metrics_of(run_dir)])
    assert 3 < len(losses[0]) < NUM_STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)
