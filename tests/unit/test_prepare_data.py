"""Rows that tools/prepare_data.py makes of GSM8K, NuminaMath and countdown."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from gsm8k_files import MODEL_SOLUTIONS, TEST, TRAIN, needs_gsm8k
from programs import CHECKOUT, load_program

from gft_megatron.data.rows import Row, read_rows
from gft_megatron.groups import Source
from gft_megatron.rewards.exact import extract_answer

prepare_data = load_program("tools/prepare_data.py")
countdown_score = load_program("examples/countdown_reward.py").score

ORIGINAL = {"question": "How many?", "answer": "2*600 = <<2*600=1200>>1,200 clips.\nAll.\n#### 1,200"}
RECORDED = {
    "question": "How many?",
    "ground_truth": "2*600 = <<2*600=1200>>1,200 clips.\nAll.\nA: 1,200",
    "6b": {"is_correct": False, "solution": "3 = <<1+2=3>>3\nA: 3"},
    "175b": {"is_correct": True, "solution": "1200\nA: 1200"},
}
EXPERT = {"text": "2*600 = 1,200 clips.\nAll.\n#### 1,200", "source": "expert"}
TEACHERS = [{"text": "3 = 3\n#### 3", "source": "teacher"}, {"text": "1200\n#### 1200", "source": "teacher"}]


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.open()]
    # Every row is one that training accepts.
    assert all(isinstance(row, Row) for _, row in read_rows(path))
    return rows


def test_gsm8k_files_are_told_apart_and_merged(tmp_path: Path) -> None:
    original, recorded = write(tmp_path / "a", ORIGINAL), write(tmp_path / "b", RECORDED)
    for files, responses in [
        ((original,), [EXPERT]),
        ((recorded,), [EXPERT, *TEACHERS]),
        ((original, recorded), [EXPERT, *TEACHERS]),
        ((recorded, original), [EXPERT, *TEACHERS]),
    ]:
        prepare_data.gsm8k(output=tmp_path / "out", input=files)
        assert read(tmp_path / "out") == [{"prompt": "How many?", "label": "1200", "responses": responses}]
    other = write(tmp_path / "c", ORIGINAL | {"question": "How much?"})
    prepare_data.gsm8k(output=tmp_path / "out", input=(other,), model_solutions=(recorded,))
    assert [row["prompt"] for row in read(tmp_path / "out")] == ["How much?"]


@needs_gsm8k
def test_gsm8k_of_the_real_files(tmp_path: Path) -> None:
    prepare_data.gsm8k(output=tmp_path / "train", input=(TRAIN,))
    prepare_data.gsm8k(output=tmp_path / "test", input=(TEST,), model_solutions=(MODEL_SOLUTIONS,))
    train, test = read(tmp_path / "train"), read(tmp_path / "test")
    assert (len(train), len(test)) == (7473, 1319)
    sources = Counter(tuple(response["source"] for response in row["responses"]) for row in train + test)
    assert sources == {("expert",): 7473, ("expert", *["teacher"] * 4): 1319}
    for row in train + test:
        assert re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", row["label"]), row
        assert extract_answer(row["responses"][0]["text"]).replace(",", "") == row["label"]
        # A few recorded solutions break off inside an annotation.
        assert not any(re.search("<<.*>>", response["text"]) for response in row["responses"])


def test_numina_takes_the_last_box_and_leaves_rows_without_out(tmp_path: Path) -> None:
    records = [
        {"problem": "p", "solution": r"\boxed{1}, no: \boxed{\frac{1}{2}}."},
        {"problem": "q", "solution": "a proof"},
    ]
    prepare_data.numina(output=tmp_path / "out", input=(write(tmp_path / "in", *records),))
    expert = {"text": records[0]["solution"], "source": "expert"}
    assert read(tmp_path / "out") == [{"prompt": "p", "label": r"\frac{1}{2}", "responses": [expert]}]


def test_countdown(tmp_path: Path) -> None:
    prepare_data.countdown(output_dir=tmp_path, seed=3)
    train, warmup, test = (read(tmp_path / f"{name}.jsonl") for name in ("train", "warmup", "test"))
    assert (len(train), len(warmup), len(test)) == (919, 20_000, 394)
    problems = [{row["prompt"] for row in rows} for rows in (train, warmup, test)]
    assert len(problems[0]) == 919 and len(problems[2]) == 394 and not problems[0] & problems[2]
    assert problems[1] == problems[0]

    def right(row: dict[str, Any], source: str) -> list[float]:
        texts = [response["text"] for response in row["responses"] if response["source"] == source]
        return [countdown_score(text, row["label"], row["metadata"]) for text in texts]

    for row in train + test:
        digits, target = row["metadata"]["digits"], row["metadata"]["target"]
        assert row["prompt"] == f"{','.join(map(str, digits))}={target}:" and row["label"] == str(target)
    assert all(right(row, "expert") == [1.0] and len(right(row, "teacher")) == 3 for row in train)
    assert all(right(row, "expert") == [1.0] and right(row, "teacher") == [] for row in test)
    # Four fifths right answers; of noise about a twentieth is right by chance.
    teacher = [score for row in train for score in right(row, "teacher")]
    assert 0.78 < sum(teacher) / len(teacher) < 0.88
    experts = sum(len(right(row, "expert")) for row in warmup)
    assert 0.24 < experts / len(warmup) < 0.26


def test_countdown_validation_comes_out_of_the_training_problems(tmp_path: Path) -> None:
    names = ("train", "warmup", "validation", "test")
    prepare_data.countdown(output_dir=tmp_path / "whole")
    prepare_data.countdown(output_dir=tmp_path / "split", validation=184)
    assert not (tmp_path / "whole/validation.jsonl").exists()
    train, warmup, validation, test = ({row["prompt"] for row in read(tmp_path / f"split/{n}.jsonl")} for n in names)
    assert (len(train), len(validation)) == (735, 184)
    assert train == warmup and not validation & train
    assert validation | train == {row["prompt"] for row in read(tmp_path / "whole/train.jsonl")}
    assert (tmp_path / "split/test.jsonl").read_bytes() == (tmp_path / "whole/test.jsonl").read_bytes()
    with pytest.raises(ValueError, match="--validation 919: .* below 919"):
        prepare_data.countdown(output_dir=tmp_path, validation=919)


def test_countdown_problems_are_fixed_and_answers_follow_the_seed(tmp_path: Path) -> None:
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        prepare_data.countdown(output_dir=tmp_path / name, seed=seed)
    for file in ("train.jsonl", "warmup.jsonl", "test.jsonl"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b and (a == c) == (file == "test.jsonl")
    a, c = (read(tmp_path / name / "train.jsonl") for name in "ac")
    assert [row["prompt"] for row in a] == [row["prompt"] for row in c]
    assert a[0]["prompt"] == "2,5,8=21:"  # the split of the measured spike: seed 7 over the sorted problems


def test_expert_of_countdown_is_the_first_of_all_answers(tmp_path: Path) -> None:
    prepare_data.countdown(output_dir=tmp_path)
    rows = {row["prompt"]: row for row in read(tmp_path / "train.jsonl")}
    assert rows["2,5,8=21:"]["responses"][0] == {"text": "2*8+5", "source": "expert"}
    assert next(read_rows(tmp_path / "train.jsonl"))[1].responses[0].source is Source.EXPERT


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gsm8k", "--output", "out"], "error: give either --input FILE... or --hub"),
        (["gsm8k", "--output", "out", "--input", "gone"], "error: [Errno 2] No such file or directory: 'gone'"),
        (["gsm8k", "--output", "out", "--input", "broken"], "error: broken line 2: Expecting value"),
        (["numina", "--output", "out", "--input", "good"], "error: a record of the input has no 'solution'"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    write(tmp_path / "good", ORIGINAL)
    (tmp_path / "broken").write_text(json.dumps(ORIGINAL) + "\nno json\n")
    program = [sys.executable, CHECKOUT / "tools/prepare_data.py", *arguments]
    ended = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stderr.startswith(message) and ended.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "good"]
