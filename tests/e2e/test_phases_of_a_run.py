"""A run of phases: killed on either side of a boundary, it goes on bit for bit; CADFT rewrites what does not fit."""

import json
import random
import shutil

from e2e_runs import PROGRAM, metrics_of
from test_resume import COMPARED, wait_for_step
from torchrun import kill, start_torchrun, stopped, torchrun

PHASES = (
    "cadft:4:batch_statistics=previous-step,gft:3:lr=5e-4,"
    "grpo:3:optimizer=reset:kl_coef=0.1:mix_loss=dft:schedule=mix_coef=1:0:linear"
)


def test_killed_on_either_side_of_a_boundary(flags, tmp_path):
    flags = [
        *flags, "--phases", PHASES, "--lr-decay-style", "cosine", "--tensor-model-parallel-size", 2,
        "--save-interval", 1, "--rm-type", "tests/e2e/digit_reward.py:score",
        "--rewrite-interval", 2, "--rewrite-warmup", 1, "--rewrite-share", 0.5, "--rewrite-probability", 1,
    ]  # fmt: skip
    process = start_torchrun(PROGRAM, *flags, "--run-dir", tmp_path / "whole", num_ranks=2)
    wait_for_step(tmp_path / "whole", 6, process)  # then it is in the last step of a phase
    with stopped(process):
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-4000:]
    expected = metrics_of(tmp_path / "whole")
    lr = [step["train/lr"] for step in expected]
    assert lr[0] == lr[7] == 1e-3 and lr[4] == 5e-4 and lr[3] < lr[0] and lr[6] < lr[4]
    assert [step.get("train/mix_coef") for step in expected] == [None] * 7 + [1.0, 0.5, 0.0]
    rewrites = (tmp_path / "whole" / "rewrites.jsonl").read_text()
    assert rewrites

    flags += ["--run-dir", tmp_path / "cut"]
    process = start_torchrun(PROGRAM, *flags, num_ranks=2)
    wait_for_step(tmp_path / "cut", 8, process)  # in the second step of the next phase
    kill(process)
    process.communicate()
    assert len(metrics_of(tmp_path / "cut")) < 10
    resumed = torchrun(PROGRAM, *flags, num_ranks=2)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    got = metrics_of(tmp_path / "cut")
    assert [record["step"] for record in got] == list(range(1, 11))
    compared = (*COMPARED, "train/mix_coef", "train/ref_kl_mean", "train/weight_mean")
    for one, other in zip(expected, got, strict=True):
        assert {key: one.get(key) for key in compared} == {key: other.get(key) for key in compared}, one["step"]
    assert (tmp_path / "cut" / "rewrites.jsonl").read_text() == rewrites


def test_rewriting_finds_planted_demonstrations(flags, tmp_path, toy):
    """One answer in twenty is that of another prompt: of the responses that are rewritten, at least 80% are these."""
    rows = [json.loads(line) for line in (toy / "data" / "train.jsonl").read_text().splitlines()][:400]
    experts = [[r for r in row["responses"] if r["source"] == "expert"] for row in rows]
    planted = random.Random(1).sample(range(400), 20)
    moved = dict(zip(planted, planted[1:] + planted[:1], strict=True))
    data = tmp_path / "planted.jsonl"
    lines = [json.dumps({**row, "responses": experts[moved.get(i, i)]}) for i, row in enumerate(rows)]
    data.write_text("\n".join(lines))
    done = torchrun(
        PROGRAM, *flags, "--prompt-data", data, "--rollout-batch-size", 640, "--num-steps-per-rollout", 10,
        "--phases", "sft:70:lr=5e-3,cadft:10:rewrite_interval=10", "--rewrite-warmup", 0,
        "--rewrite-share", 0.03, "--rewrite-probability", 1, num_ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rewrites = [json.loads(line) for line in (tmp_path / "run" / "rewrites.jsonl").read_text().splitlines()]
    assert len(rewrites) >= 8
    assert sum(rewrite["row"] in planted for rewrite in rewrites) >= 0.8 * len(rewrites)
    assert all(
        rewrite["original"] == experts[moved.get(rewrite["row"], rewrite["row"])][0]["text"] for rewrite in rewrites
    )
