"""A trainer killed again and again while it collects, trains and saves: nothing is lost, nothing is trained on twice.

Three times here; GFT_CHAOS_KILLS=20 for as many as the README promises.
"""

import os
import random
import time
from collections import Counter

import pytest
from e2e_runs import finished_groups, metrics_of, short_run
from forked_ranks import ForkedRun
from test_resume import COMPARED

from gft_megatron.groups import GroupKey
from gft_megatron.rollout.bank.ledger import ledger_paths, scan, valid_markers

KILLS = int(os.environ.get("GFT_CHAOS_KILLS", "3"))
NUM_RANKS = 2
GROUPS_PER_STEP = 8
NUM_STEPS = 4 * KILLS


@pytest.fixture(scope="module")
def flags(toy, tmp_path_factory):
    few = tmp_path_factory.mktemp("data") / "few.jsonl"
    few.write_text("".join((toy / "data" / "train.jsonl").open().readlines()[:200]))
    return [
        *short_run(toy), "--prompt-data", few, "--train-iters", NUM_STEPS, "--save-interval", 2, "--keep-last", 1000,
        "--rm-type", "tests/e2e/digit_reward.py:score", "--rollout-batch-size", GROUPS_PER_STEP,
    ]  # fmt: skip


def test_killed_at_random_moments(flags, tmp_path):
    draw = random.Random(KILLS)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    lasts: dict[str, list[float]] = {}
    began = time.monotonic()
    with ForkedRun([*flags, "--run-dir", whole], num_ranks=NUM_RANKS, log=tmp_path / "whole.log") as run:
        while stage := run.next_stage():
            entered = time.monotonic()
            run.hear()
            lasts.setdefault(stage, []).append(time.monotonic() - entered)
        assert run.exit_statuses() == [0] * NUM_RANKS, (tmp_path / "whole.log.0").read_text()[-2000:]
    seconds = {stage: min(times) for stage, times in lasts.items()}
    print(f"\nthe run that was left alone: {time.monotonic() - began:.1f} s; its stages: {seconds}")
    expected = metrics_of(whole)
    assert len(expected) == NUM_STEPS

    began = time.monotonic()
    victims = Counter[str | None]()
    recorded: dict[GroupKey, bytes] = {}
    for number in range(KILLS):
        wanted = ("collect", "update", "save")[number % 3]
        skipped = draw.randrange(2)
        with ForkedRun([*flags, "--run-dir", cut], num_ranks=NUM_RANKS, log=tmp_path / "cut.log") as run:
            while (stage := run.next_stage()) != wanted or skipped:
                assert stage is not None, (tmp_path / "cut.log.0").read_text()[-2000:]
                skipped -= stage == wanted
            time.sleep(draw.random() * seconds[wanted])
            victims[run.kill()] += 1
        now = finished_groups(cut / "bank")
        oldest = min(map(int, (path.name[5:] for path in (cut / "checkpoints").glob("iter_" + "[0-9]" * 7))), default=0)
        # A group that was finished once is there as it was, until every checkpoint has its step behind it.
        assert {key: record for key, record in recorded.items() if key.rollout_id >= oldest}.items() <= now.items()
        recorded = now
    print(f"{KILLS} kills: {time.monotonic() - began:.1f} s, while in {dict(victims)}, {len(recorded)} groups then")

    with ForkedRun([*flags, "--run-dir", cut], num_ranks=NUM_RANKS, log=tmp_path / "cut.log") as run:
        assert run.exit_statuses() == [0] * NUM_RANKS, (tmp_path / "cut.log.0").read_text()[-2000:]
    got = metrics_of(cut)
    assert [record["step"] for record in got] == list(range(1, NUM_STEPS + 1))
    for one, other in zip(expected, got, strict=True):
        assert {name: one.get(name) for name in COMPARED} == {name: other.get(name) for name in COMPARED}, one["step"]

    # The ledgers' own account: each group trained on in one step, the one that it was drawn for. The first checkpoint
    # is of step 2: nothing of the groups before it has to be there any more.
    ledgers = [scan(path) for path in ledger_paths(cut / "bank")]
    used = {key: step for key, step in valid_markers(ledgers).items() if key.rollout_id >= 2}
    assert used == {GroupKey(n, i): n + 1 for n in range(2, NUM_STEPS) for i in range(GROUPS_PER_STEP)}
    groups = finished_groups(cut / "bank")
    undisturbed = finished_groups(whole / "bank")
    assert {key: groups[key] for key in used} == {key: undisturbed[key] for key in used}
