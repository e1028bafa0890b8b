"""The bank as the terminal shows it: what is there, what became of it, and model text that is only text."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from programs import load_program

from gft_megatron.groups import Group, GroupKey, Prompt, Sample, Source, WeightSpan
from gft_megatron.rollout.bank import Bank

TOOL = load_program("tools/inspect_groups.py")
HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]x[/] [/nothing] \u202e\ud800 :smile:\nsecond line"


def group(row: int, *rewards: float) -> Group:
    expert = Sample(Source.EXPERT, np.arange(3), "by heart", float("nan"), response=1)
    own = [
        Sample(
            Source.SELF, np.arange(4 + i), HOSTILE, reward, truncated=i == 0,
            rollout_log_probs=np.full(4 + i, -0.5, np.float32), weight_spans=(WeightSpan(6 + i, 0, 4 + i),),
        )
        for i, reward in enumerate(rewards)
    ]  # fmt: skip
    return Group(Prompt(row, np.zeros(1, np.int64), ""), (expert, *own))


@pytest.fixture
def run_dir(tmp_path) -> Path:
    banks = [
        Bank.open(tmp_path / "bank", rank=rank, num_ranks=2, fingerprint="f", checkpoint_iteration=0)
        for rank in range(2)
    ]
    banks[0].append([(GroupKey(0, 0), group(40, 1.0, 0.25)), (GroupKey(1, 0), group(41, 0.0))])
    banks[1].append([(GroupKey(0, 1), group(42, 0.5))])
    banks[1].mark_dropped({GroupKey(1, 1): "\x1b[31mtoo [bold]many[/] failures"})
    banks[0].mark_consumed([GroupKey(0, 0), GroupKey(0, 1)], 7)
    for bank in banks:
        bank.close()
    return tmp_path


@pytest.fixture
def inspect(run_dir, monkeypatch, capsys):
    def call(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["inspect_groups.py", str(run_dir), *arguments])
        TOOL.main()
        return capsys.readouterr().out

    return call


def test_groups_as_lines(run_dir, inspect):
    ledgers = {path: path.read_bytes() for path in (run_dir / "bank").iterdir()}
    lines = inspect().splitlines()
    assert [line.split("\t") for line in lines[:5]] == [
        ["group", "row", "sources", "rewards", "lengths", "truncated", "weights", "state"],
        ["0/0", "40", "1 expert 2 self", "- 1 0.25", "3 4 5", "1", "6-7", "consumed at step 7"],
        ["0/1", "42", "1 expert 1 self", "- 0.5", "3 4", "1", "6", "consumed at step 7"],
        ["1/0", "41", "1 expert 1 self", "- 0", "3 4", "1", "6", "finished"],
        ["1/1", "-", "-", "-", "-", "-", "-", "dropped: [31mtoo [bold]many[/] failures"],
    ]
    size = sum(map(len, ledgers.values()))
    assert lines[5].startswith(f"4 groups: 1 finished, 2 consumed, 1 dropped; 2 ledgers, {size:,} bytes, ")
    assert len(lines) == 6
    assert {path: path.read_bytes() for path in (run_dir / "bank").iterdir()} == ledgers


def test_damage_is_told_and_the_rest_shown(run_dir, inspect):
    first = run_dir / "bank" / "rank_00000.ledger"
    data = bytearray(first.read_bytes())
    data[50] ^= 1
    first.write_bytes(data)
    second = run_dir / "bank" / "rank_00001.ledger"
    second.write_bytes(second.read_bytes()[:-3])
    before = first.read_bytes(), second.read_bytes()
    lines = inspect().splitlines()
    assert [line.split("\t")[0] for line in lines[1:3]] == ["0/1", "1/0"]
    assert re.fullmatch(r"warning: rank_00000.ledger: damaged, \d+ bytes at 0", lines[4])
    assert re.fullmatch(r"warning: rank_00001.ledger: torn tail, \d+ bytes at \d+", lines[5])
    assert before == (first.read_bytes(), second.read_bytes())


def test_chosen_groups(inspect):
    for arguments, expected in (
        (["--rollout", "1"], ["1/0", "1/1"]),
        (["--row", "42"], ["0/1"]),
        (["--state", "consumed"], ["0/0", "0/1"]),
    ):
        lines = inspect(*arguments).splitlines()
        assert [line.split("\t")[0] for line in lines[1:-1]] == expected
    for text in ("1", "1/", "a/b", "-1/2"):
        with pytest.raises(SystemExit):
            inspect("--show", text)


def test_of_two_records_the_later_one_is_shown(run_dir, inspect):
    """As a resumed run takes it, whatever the number of the rank that wrote it."""
    bank = Bank.open(run_dir / "bank", rank=0, num_ranks=1, fingerprint="f", checkpoint_iteration=0)
    bank.append([(GroupKey(0, 1), group(42, 0.75))])
    bank.close()
    assert inspect("--rollout", "0").splitlines()[2].split("\t")[3] == "- 0.75"


def test_on_a_terminal_model_text_is_only_text(inspect, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich this is a terminal
    monkeypatch.setenv("COLUMNS", "160")
    table, shown = inspect(), inspect("--show", "0/0")
    assert "\x1b[1m" in table and "consumed at step 7" in table and "dropped: [31mtoo [bold]many[/] failures" in table
    for dangerous in ("\x1b[2J", "\x1b]0", "\x07", "\u202e", "\ud800", "\x1b[31m"):
        assert dangerous not in table + shown
    assert "    [2J]0;owned[bold red]x[/] [/nothing]  :smile:\n    second line\n" in shown
    assert "expert  reward -  3 tokens  response 1 of the row\n    by heart\n" in shown
    assert "self  reward 1  4 tokens  truncated  version 6 [0, 4)  mean log-prob -0.500\n" in shown


def test_what_is_not_there_is_named(inspect, run_dir):
    with pytest.raises(SystemExit, match="error: there is no readable group 5/5"):
        inspect("--show", "5/5")
    for path in (run_dir / "bank").iterdir():
        path.unlink()
    with pytest.raises(SystemExit, match="error: .*bank holds no ledger"):
        inspect()
