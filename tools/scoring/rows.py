"""From a data file to the same file with a number for each token of its responses; rows stream through."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from scoring.method import Method, Response, Score
from scoring.models import load_tokenizer
from transformers import PreTrainedTokenizerBase

from gft_megatron.data.encode import EncodedRow, Limits, encode_rows
from gft_megatron.data.rows import BadRow, Row, RowResponse, check_row, read_values
from gft_megatron.observe.console import LogConsole

_CHUNK_ROWS = 256
_ANY_LENGTH = sys.maxsize
_Json = dict[str, Any]


def score_file(method: Method) -> None:
    """Write `method.output`, whole or not at all, and say what was done.

    Rows that training would set aside (bad form, longer than the model's positions) are left out.

    Raises:
        ValueError: in one line, what is wrong with a file or a model.
    """
    tokenizer = load_tokenizer("--hf-checkpoint", method.hf_checkpoint)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--hf-checkpoint {method.hf_checkpoint}: the tokenizer has no end-of-sequence token")
    bad_rows: list[str] = []

    def responses(purpose: str) -> Iterator[list[Response]]:
        for chunk in _chunks(method, tokenizer, purpose, []):
            yield [response for _, row in chunk for response in _responses(row)]

    score = method.scorer(tokenizer, responses)
    method.output.parent.mkdir(parents=True, exist_ok=True)
    partial = method.output.with_name(f"{method.output.name}.{os.getpid()}.partial")
    num_rows = num_responses = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for chunk in _chunks(method, tokenizer, "scoring", bad_rows):
                for value in _with_scores(chunk, score, method.key):
                    file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
                    num_rows += 1
                    num_responses += len(value.get("responses") or ())
        if not num_responses:
            first = f"; the first of {len(bad_rows)} bad rows is {bad_rows[0]}" if bad_rows else ""
            raise ValueError(f"{method.input} has no recorded response to score{first}")
        os.replace(partial, method.output)
    finally:
        partial.unlink(missing_ok=True)
    if bad_rows:
        print(f"warning: {len(bad_rows)} bad rows are left out, the first is {bad_rows[0]}")
    print(f"{method.output}: {num_rows} prompts, {num_responses} responses with {method.key}")


def _chunks(
    method: Method, tokenizer: PreTrainedTokenizerBase, purpose: str, bad_rows: list[str]
) -> Iterator[list[tuple[_Json, EncodedRow]]]:
    """Good rows, as they stand in the file and as training reads them; of bad ones `bad_rows` gets line and reason."""
    length = method.max_tokens or _ANY_LENGTH
    limits = Limits(max_prompt_length=length, max_response_length=length, vocab_size=len(tokenizer))
    with _progress(purpose) as progress:
        values = read_values(method.input)
        num_read = 0
        while chunk := list(islice(values, _CHUNK_ROWS)):
            rows = encode_rows([_unscored(value) for _, value in chunk], tokenizer, limits, eta=0.5)
            good = []
            for (line, value), row in zip(chunk, rows, strict=True):
                row = _checked_length(row, length)
                if isinstance(row, BadRow):
                    bad_rows.append(f"line {line}: {row}")
                else:
                    good.append((value, row))
            yield good
            num_read += len(chunk)
            progress(num_read)


def _unscored(value: Any) -> Row | BadRow:
    """The row without the numbers of an earlier scoring, whatever tokenizer they were made with."""
    try:
        row = check_row(value)
    except BadRow as bad:
        return bad
    return dataclasses.replace(row, responses=tuple(RowResponse(r.text, r.source) for r in row.responses))


def _checked_length(row: EncodedRow | BadRow, length: int) -> EncodedRow | BadRow:
    if isinstance(row, BadRow):
        return row
    longest = len(row.prompt_ids) + max((len(response.token_ids) for response in row.responses), default=0)
    return row if longest <= length else BadRow(f"prompt and response have {longest} tokens, the model takes {length}")


def _responses(row: EncodedRow) -> list[Response]:
    return [Response(row.prompt_ids, response.token_ids, response.text) for response in row.responses]


def _with_scores(chunk: list[tuple[_Json, EncodedRow]], score: Score, key: str) -> Iterator[_Json]:
    responses = [response for _, row in chunk for response in _responses(row)]
    scores = iter(score(responses) if responses else ())
    for value, row in chunk:
        if not row.responses:
            yield value
            continue
        plain = ({k: v for k, v in r.items() if k not in ("token_scores", "token_groups")} for r in value["responses"])
        # Six digits, as in fp32: the files of 17 are twice as long.
        yield value | {"responses": [r | {key: [_short(x) for x in next(scores).tolist()]} for r in plain]}


def _short(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(f"a score is {number}: a model's output is not finite; without --bf16 it may be")
    return number if isinstance(number, int) else float(f"{number:.6g}")


def _progress(purpose: str) -> AbstractContextManager[Callable[[int], None]]:
    """Counts rows, moving on a terminal, a line now and then in a log."""
    return (
        _moving(purpose) if sys.stdout.isatty() else LogConsole(sys.stdout, train_iters=0).stage(purpose, unit="rows")
    )


@contextmanager
def _moving(purpose: str) -> Iterator[Callable[[int], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:,.0f} rows"), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(purpose, total=None)
        yield lambda done: bar.update(task, completed=done)
