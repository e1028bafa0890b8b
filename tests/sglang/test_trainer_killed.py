"""The trainer killed again and again while real servers draw for it: what they have drawn is used, once, as it was.

Servers do not draw the same again. So what a run has to show is not an undisturbed run's figures but its own: a step
that is trained a second time, from a checkpoint, has the loss that it had the first time. GFT_CHAOS_KILLS: how often.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from e2e_runs import finished_groups, metrics_of, run_tool
from forked_ranks import ForkedRun

from gft_megatron.groups import GroupKey
from gft_megatron.observe.metrics import read_metrics
from gft_megatron.rollout.bank.ledger import ledger_paths, scan, valid_markers
from gft_megatron.rollout.sglang.http import Keys
from gft_megatron.rollout.sglang.keys import key_variables

KILLS = int(os.environ.get("GFT_CHAOS_KILLS", "20"))
GROUPS = 6
SAVED = 3
STEPS = 3 * KILLS
STAGES = ("collect", "update", "save")
SAME = ("train/loss", "train/grad_norm", "rollout/reward_mean", "rollout/response_length_mean_self")


@pytest.mark.on_request  # test_training.py kills the servers, tests/e2e/test_killed_anywhere.py a trainer without any
def test_killed_at_random_moments(
    sglang_workers: tuple[str, str],
    sglang_model: Path,
    sglang_keys: Keys,
    tmp_path: Path,
) -> None:
    run_tool("prepare_data.py", "countdown", "--output-dir", tmp_path / "data", "--seed", 1)
    run_dir = tmp_path / "run"
    flags = [
        "--hf-checkpoint", sglang_model, "--prompt-data", tmp_path / "data" / "train.jsonl", "--run-dir", run_dir,
        "--rm-type", "examples/countdown_reward.py:score",
        "--seq-length", 32, "--rollout-max-response-len", 6, "--rollout-batch-size", GROUPS,
        "--loss", "gft", "--n-expert", 1, "--n-teacher", 1, "--n-self", 4, "--no-skip-zero-variance",
        "--lr", 1e-3, "--train-iters", STEPS, "--save-interval", SAVED, "--keep-last", 1000, "--eval-interval", 0,
        "--tensor-model-parallel-size", 2, "--max-staleness", 1,
        "--rollout-engine", "sglang", "--sglang-urls", *sglang_workers, "--weight-sync", "distributed",
    ]  # fmt: skip
    settings = {"num_ranks": 2, "log": tmp_path / "run.log", "environment": key_variables(sglang_keys)}
    draw = random.Random(KILLS)
    victims = Counter[str | None]()
    figures: dict[int, dict[str, float]] = {}
    groups: dict[GroupKey, bytes] = {}
    again = 0
    for number in range(KILLS + 1):
        with ForkedRun([*flags], **settings) as run:
            if number < KILLS:
                wanted, skipped = STAGES[number % 3], draw.randrange(3)
                while (stage := run.next_stage()) != wanted or skipped:
                    assert stage is not None, (tmp_path / "run.log.0").read_text()[-3000:]
                    skipped -= stage == wanted
                time.sleep(draw.random() * 0.3)
                victims[run.kill()] += 1
            else:
                assert run.exit_statuses() == [0, 0], (tmp_path / "run.log.0").read_text()[-3000:]
        for record in read_metrics(run_dir / "metrics.jsonl"):
            if "train/loss" not in record:
                continue
            first = figures.setdefault(int(record["step"]), record)
            again += first != record  # its seconds are others
            assert {name: record[name] for name in SAME} == {name: first[name] for name in SAME}, record["step"]
        now = finished_groups(run_dir / "bank")
        assert {key: group for key, group in groups.items() if key.rollout_id >= SAVED}.items() <= now.items()
        groups = now
    print(f"\n{KILLS} kills while in {dict(victims)}; {again} steps were trained again")
    assert again >= KILLS // 3
    assert [record["step"] for record in metrics_of(run_dir)] == list(range(1, STEPS + 1))
    used = valid_markers([scan(path) for path in ledger_paths(run_dir / "bank")])
    assert {key: step for key, step in used.items() if key.rollout_id >= SAVED} == {
        GroupKey(rollout, i): rollout + 1 for rollout in range(SAVED, STEPS) for i in range(GROUPS)
    }
