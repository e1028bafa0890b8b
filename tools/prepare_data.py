"""Write data files of rows {prompt, label, responses, metadata} from known data sets.

python tools/prepare_data.py gsm8k --input train.jsonl --output gsm8k.jsonl
python tools/prepare_data.py numina --hub --output numina.jsonl
python tools/prepare_data.py countdown --output-dir data --seed 1
"""

from __future__ import annotations

import itertools
import json
import operator
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tyro

from gft_megatron.rewards.exact import last_boxed

Json = dict[str, Any]


def gsm8k(
    output: Path,
    input: tuple[Path, ...] = (),
    model_solutions: tuple[Path, ...] = (),
    hub: bool = False,
    split: str = "train",
) -> None:
    """Grade-school mathematics. The expert is the published solution, teachers are recorded model solutions.

    Args:
        output: File to write.
        input: GSM8K files: {question, answer} and example_model_solutions.jsonl, merged by question.
        model_solutions: Files like example_model_solutions.jsonl: teachers for the questions of the input.
        hub: Read openai/gsm8k from the Hugging Face hub.
        split: Part to read from the hub.
    """
    rows: dict[str, Json] = {}
    for record in _records(input, hub, ("openai/gsm8k", "main", split)):
        rows.setdefault(record["question"], _gsm8k_row(record))["responses"] += _gsm8k_teachers(record)
    for record in _read_json_lines(model_solutions):
        if record["question"] in rows:
            rows[record["question"]]["responses"] += _gsm8k_teachers(record)
    _write(output, rows.values())


def numina(output: Path, input: tuple[Path, ...] = (), hub: bool = False, split: str = "train") -> None:
    r"""NuminaMath-CoT. The expert is the solution, the label what stands in its last \boxed{}; others are left out.

    Args:
        output: File to write.
        input: Files of {problem, solution}.
        hub: Read AI-MO/NuminaMath-CoT from the Hugging Face hub.
        split: Part to read from the hub.
    """

    def rows() -> Iterator[Json]:
        for record in _records(input, hub, ("AI-MO/NuminaMath-CoT", split)):
            label = last_boxed(record["solution"])
            if label:
                yield _row(record["problem"], label, [("expert", record["solution"])])

    _write(output, rows())


def countdown(output_dir: Path, seed: int = 0, validation: int = 0) -> None:
    """A toy task: reach a target with three digits and + - *. 919 problems to train on, 394 held out.

    Args:
        output_dir: Folder for train.jsonl, warmup.jsonl and test.jsonl.
        seed: Of the recorded answers. The problems are always the same.
        validation: So many of the problems to train on go to validation.jsonl instead, for choosing settings.
    """
    answers = _countdown_answers()
    problems = sorted(answers)
    random.Random(7).shuffle(problems)
    num_seen = int(0.7 * len(problems))
    if not 0 <= validation < num_seen:
        raise ValueError(f"--validation {validation}: it has to be at least 0 and below {num_seen}")
    num_train = num_seen - validation
    train, held_out = problems[:num_train], {"test": problems[num_seen:]}
    if validation:
        held_out["validation"] = problems[num_train:num_seen]
    rng = random.Random(seed)

    def expert(problem: Problem) -> tuple[str, str]:
        return "expert", answers[problem][0]

    def teacher(problem: Problem) -> tuple[str, str]:
        if rng.random() < 0.8:
            return "teacher", rng.choice(answers[problem])
        a, b, c = rng.sample(problem[0], 3)
        return "teacher", f"{a}{rng.choice('+-*')}{b}{rng.choice('+-*')}{c}"

    def warmup() -> Iterator[Json]:
        for problem in rng.choices(train, k=20_000):
            yield _countdown_row(problem, [expert(problem) if rng.random() < 0.25 else teacher(problem)])

    _write(output_dir / "train.jsonl", (_countdown_row(p, [expert(p), *(teacher(p) for _ in range(3))]) for p in train))
    _write(output_dir / "warmup.jsonl", warmup())
    for name, part in held_out.items():  # the expert's answer: how likely does a model find what it never saw?
        _write(output_dir / f"{name}.jsonl", (_countdown_row(p, [expert(p)]) for p in part))


_ANNOTATION = re.compile(r"<<[^<>]*>>")
_FINAL_ANSWER = re.compile(r"^(?:A:|####)\s*(.*)$", re.MULTILINE)


def _gsm8k_row(record: Json) -> Json:
    """GSM8K's own files keep the solution in `answer`, the file of model solutions in `ground_truth`."""
    solution = _gsm8k_solution(record.get("answer") or record["ground_truth"])
    _, mark, label = solution.rpartition("#### ")
    if not mark:
        raise ValueError(f"no final answer in the solution of {record['question']!r}")
    return _row(record["question"], label.replace(",", ""), [("expert", solution)])


def _gsm8k_teachers(record: Json) -> list[Json]:
    solutions = [value["solution"] for value in record.values() if isinstance(value, dict) and "solution" in value]
    return [_response("teacher", _gsm8k_solution(solution)) for solution in solutions]


def _gsm8k_solution(text: str) -> str:
    """Without calculator annotations, and with the final answer as "#### N" in both kinds of file."""
    return _FINAL_ANSWER.sub(r"#### \1", _ANNOTATION.sub("", text)).strip()


Problem = tuple[tuple[int, ...], int]  # three digits in order, target
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def _countdown_answers() -> dict[Problem, list[str]]:
    """Every problem with a target of 1 to 99, and its valid answers in alphabetical order."""
    answers: dict[Problem, list[str]] = {}
    for a, b, c in itertools.product(range(1, 10), repeat=3):
        for p, q in itertools.product(_OPERATORS, repeat=2):
            from_the_left = _OPERATORS[q](_OPERATORS[p](a, b), c)
            value = _OPERATORS[p](a, b * c) if q == "*" else from_the_left
            if 1 <= value <= 99:
                answers.setdefault((tuple(sorted((a, b, c))), value), []).append(f"{a}{p}{b}{q}{c}")
    return {problem: sorted(expressions) for problem, expressions in answers.items()}


def _countdown_row(problem: Problem, responses: list[tuple[str, str]]) -> Json:
    digits, target = problem
    prompt = f"{','.join(map(str, digits))}={target}:"
    return _row(prompt, str(target), responses) | {"metadata": {"digits": list(digits), "target": target}}


def _row(prompt: str, label: str, responses: list[tuple[str, str]]) -> Json:
    return {"prompt": prompt, "label": label, "responses": [_response(*response) for response in responses]}


def _response(source: str, text: str) -> Json:
    return {"text": text, "source": source}


def _records(files: tuple[Path, ...], hub: bool, hub_name: tuple[str, ...]) -> Iterable[Json]:
    if hub == bool(files):
        raise ValueError("give either --input FILE... or --hub")
    return _read_hub(*hub_name) if hub else _read_json_lines(files)


def _read_hub(*name: str) -> Iterable[Json]:
    try:
        import datasets
    except ImportError:
        raise ValueError("--hub needs the package datasets: pip install datasets") from None
    *place, split = name
    return datasets.load_dataset(*place, split=split)


def _read_json_lines(files: tuple[Path, ...]) -> Iterator[Json]:
    for path in files:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path} line {number}: {error}") from None


def _write(path: Path, rows: Iterable[Json]) -> None:
    """Write all rows or nothing, and say how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    num_rows = num_responses = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                num_rows += 1
                num_responses += len(row["responses"])
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{path}: {num_rows} prompts, {num_responses} recorded responses")


def main() -> None:
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"gsm8k": gsm8k, "numina": numina, "countdown": countdown}, description=__doc__
        )
    except KeyError as error:
        raise SystemExit(f"error: a record of the input has no {error}") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
