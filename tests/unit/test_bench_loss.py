"""tools/bench_loss.py as a user runs it, with sizes that take a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.candidates import Candidate
from bench.settings import BenchLoss
from bench.timing import measure_problem
from programs import CHECKOUT

pytestmark = pytest.mark.slow

FIELDS = {
    "name", "device", "dtype", "tensor_parallel", "seconds", "cpu_seconds", "gb_per_s", "floor_share",
    "peak_extra_bytes", "collectives", "max_abs_error",
}  # fmt: skip
NUM_TOKENS, VOCAB_SIZE = 64, 32768
LOGITS = NUM_TOKENS * VOCAB_SIZE
MEGATRON, FUSED = "Megatron vocab_parallel_cross_entropy", "Megatron fused_vocab_parallel_cross_entropy"
OURS = ["ours", "ours in place", "ours in place + entropy"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Compiling Megatron's fused operator would take longer than everything else here.
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": str(CHECKOUT)}
    program = [sys.executable, str(CHECKOUT / "tools" / "bench_loss.py"), *arguments]
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What one run says, and the folder with its files."""
    folder = tmp_path_factory.mktemp("bench")
    sizes = ["--num-tokens", str(NUM_TOKENS), "--vocab-size", str(VOCAB_SIZE), "--repeats", "1", "--entropy"]
    names = {"--json": "rows.json", "--markdown": "table.md", "--picture": "bars.png"}
    files = [text for flag, name in names.items() for text in (flag, str(folder / name))]
    result = bench("--dtype", "fp32", "bf16", "--tensor-parallel", "1", "2", *sizes, *files)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, folder


@pytest.fixture(scope="module")
def rows(outcome: tuple[str, Path]) -> dict[tuple[str, int, str], dict[str, Any]]:
    listed = json.loads((outcome[1] / "rows.json").read_text())
    assert all(set(row) == FIELDS for row in listed)
    by_name = {(row["dtype"], row["tensor_parallel"], row["name"]): row for row in listed}
    assert len(by_name) == len(listed)
    return by_name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [1, 2])
def test_everybody_who_can_takes_part(rows: dict, dtype: str, size: int) -> None:
    expected = {"copy", MEGATRON, FUSED, *OURS}
    if size == 1:
        expected |= {"torch cross_entropy", "torch log_softmax + gather"}
    found = {name for *section, name in rows if section == [dtype, size]}
    assert found - {"ours one sweep"} == expected


def test_numbers_fit_together(rows: dict) -> None:
    for (dtype, size, name), row in rows.items():
        copy = rows[dtype, size, "copy"]
        logits_bytes = LOGITS * {"fp32": 4, "bf16": 2}[dtype] / size
        moved = (2 if name == "copy" else 3) * logits_bytes
        assert row["device"] == "cpu" and row["seconds"] > 0 and row["cpu_seconds"] > 0
        assert row["gb_per_s"] == pytest.approx(moved / row["seconds"] / 1e9)
        share = 1.0 if name == "copy" else 1.5 * copy["cpu_seconds"] / row["cpu_seconds"]
        assert row["floor_share"] == pytest.approx(share)


def test_collectives_are_counted(rows: dict) -> None:
    for (_, size, name), row in rows.items():
        ours = 1 if size == 2 else 0
        expected = {MEGATRON: 3, FUSED: 2, **dict.fromkeys(OURS, ours)}.get(name, 0)
        assert row["collectives"] == expected, name


def test_errors_are_those_of_the_data_type(rows: dict) -> None:
    for (dtype, _, name), row in rows.items():
        if name == "copy":
            assert row["max_abs_error"] is None
        elif name.startswith("ours") or name == MEGATRON:
            # Rounding a gradient of up to 1 to bf16 leaves at most 2e-3, and 4e-3 with the entropy's part.
            assert 0 < row["max_abs_error"] < {"fp32": 1e-4, "bf16": 1e-2}[dtype], name


def test_memory_is_that_of_what_is_allocated(rows: dict) -> None:
    for dtype, item_size in (("fp32", 4), ("bf16", 2)):
        for size in (1, 2):
            logits_bytes = LOGITS * item_size / size
            out_of_place, in_place = (rows[dtype, size, name]["peak_extra_bytes"] for name in OURS[:2])
            if in_place is None:
                pytest.skip("this system does not tell a process its peak memory")
            assert in_place < 0.3 * logits_bytes
            assert 0.9 * logits_bytes < out_of_place < 1.5 * logits_bytes
    assert rows["bf16", 1, MEGATRON]["peak_extra_bytes"] > 1.8 * LOGITS * 2  # an fp32 copy


def test_table_markdown_and_picture(outcome: tuple[str, Path], rows: dict) -> None:
    said, folder = outcome
    table = (folder / "table.md").read_text()
    for dtype, size, name in rows:
        pattern = [name, dtype, str(size)]
        assert any(line.replace("*", "").split("|")[1:4] == [f" {x} " for x in pattern] for line in table.splitlines())
    assert "torch 2." in table.splitlines()[0] and "1 thread" in table.splitlines()[0]
    for text in (said, table):
        assert "fp32 TP1: ours in place is" in text and "x as fast as torch cross_entropy" in text
        assert "Liger vocab-parallel cross entropy: needs a GPU (fp32 TP1, bf16 TP1, fp32 TP2, bf16 TP2)" in text
    assert "\x1b" not in said
    assert (folder / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_linear(tmp_path: Path) -> None:
    sizes = ["--num-tokens", "64", "--vocab-size", "4096", "--hidden-size", "64", "--repeats", "1"]
    options = ["--linear", "--ignored-share", "0.75", "--dtype", "bf16"]
    result = bench(*options, *sizes, "--json", str(tmp_path / "json"), "--picture", str(tmp_path / "a.png"))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "json").read_text())}
    assert {"three bare GEMMs", "torch linear + cross_entropy", "logits + ours in place"} <= set(rows)
    gemms = rows.pop("three bare GEMMs")
    for name, row in rows.items():
        assert set(row) == FIELDS and row["gb_per_s"] is None
        live = 0.25 if "75% ignored" in name else 1.0
        assert row["floor_share"] == pytest.approx(live * gemms["cpu_seconds"] / row["cpu_seconds"])
        assert 0 < row["max_abs_error"] < 0.1, name  # logits of about 10, rounded to bf16


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dtype", "int8"], "invalid choice 'int8'"),
        (["--num-tokens", "0"], "--num-tokens must be at least 1, got 0"),
        (["--vocab-size", "7", "--tensor-parallel", "2"], "--vocab-size 7 cannot be split over --tensor-parallel 2"),
        (["--ignored-share", "0.5"], "--ignored-share belongs to --linear"),
        (["--linear", "--tensor-parallel", "2"], "--linear measures one rank"),
        (["--json", "/no/such/folder/a.json"], "--json /no/such/folder/a.json: there is no folder /no/such/folder"),
    ],
)
def test_wrong_flag_ends_with_one_line(arguments: list[str], message: str) -> None:
    result = bench(*arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr


def test_candidate_that_fails_is_left_out_and_ours_is_not() -> None:
    def fail(logits: object) -> None:
        raise NotImplementedError("no such kernel\nand a long story")

    class Failing:
        def __init__(self, ours: bool) -> None:
            self.one = Candidate("theirs", fail, ours=ours)

        def fresh(self) -> tuple[None]:
            return (None,)

        def candidates(self):
            yield self.one

        def expected(self, with_entropy: bool) -> tuple:
            return (None, None)

    settings = BenchLoss(repeats=1)
    measured, candidates, reasons = measure_problem(Failing(False), settings, None, lambda text: None)
    assert (measured, candidates, reasons) == ({}, [], ["theirs: NotImplementedError: no such kernel"])
    with pytest.raises(NotImplementedError):
        measure_problem(Failing(True), settings, None, lambda text: None)
