"""A run that is killed and started again with the same command equals one that was left alone, to the last bit."""

import json
import time

import pytest
from e2e_runs import PROGRAM, metrics_of
from torchrun import kill, start_torchrun, torchrun

LAYOUTS = {
    "tensor": ["--tensor-model-parallel-size", 2],
    "data, distributed optimizer": ["--use-distributed-optimizer"],
}
# What is the same in both runs only if weights, optimizer, schedule, data order and sampling all went on as before.
COMPARED = (
    "train/loss", "train/nll", "train/grad_norm", "train/lr", "train/num_tokens", "train/log_prob_gap_mean",
    "rollout/reward_mean", "rollout/response_length_mean_self",
)  # fmt: skip


def wait_for_step(run_dir, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        log = run_dir / "metrics.jsonl"
        if log.exists() and any(json.loads(line)["step"] >= step for line in log.read_text().splitlines()):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came: {process.stderr.read()[-2000:]}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_killed_run_goes_on_bit_for_bit(flags, tmp_path, name):
    flags = [*flags, "--train-iters", 12, "--save-interval", 3, "--lr-decay-style", "cosine", "--lr-warmup-iters", 4]
    flags += LAYOUTS[name]
    whole = torchrun(PROGRAM, *flags, "--run-dir", tmp_path / "whole", num_ranks=2)
    assert whole.returncode == 0, whole.stderr[-4000:]
    expected = metrics_of(tmp_path / "whole")
    assert len(expected) == 12

    flags += ["--run-dir", tmp_path / "cut"]
    process = start_torchrun(PROGRAM, *flags, num_ranks=2)
    wait_for_step(tmp_path / "cut", 6, process)
    kill(process)  # in step 7, or in the save that comes before it
    process.communicate()
    assert len(metrics_of(tmp_path / "cut")) < 12
    resumed = torchrun(PROGRAM, *flags, num_ranks=2)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert "resuming from" in resumed.stdout
    got = metrics_of(tmp_path / "cut")
    assert [record["step"] for record in got] == list(range(1, 13))
    for one, other in zip(expected, got, strict=True):
        assert {key: one.get(key) for key in COMPARED} == {key: other.get(key) for key in COMPARED}, one["step"]


def test_checkpoint_loads_under_another_layout(flags, tmp_path):
    """A sharded optimizer of two replicas goes on under TP2 and PP2: the next losses agree up to rounding."""
    flags = [*flags, "--save-interval", 4, "--use-distributed-optimizer"]
    save = tmp_path / "checkpoints"
    done = torchrun(PROGRAM, *flags, "--train-iters", 4, "--save", save, num_ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = {}
    for layout in ([], ["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2]):
        run_dir = tmp_path / "-".join(["resumed", *map(str, layout)])
        # Recorded responses only: own samples depend on the engine's share of the prompts, hence on the layout.
        done = torchrun(
            PROGRAM, *flags, "--run-dir", run_dir, "--load", save, "--train-iters", 7, *layout, "--n-self", 0,
            num_ranks=2,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        losses[len(losses)] = [record["train/loss"] for record in metrics_of(run_dir)]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)
