"""Read the rows of a data file, JSON Lines or Parquet, and check their form. Nothing here knows a tokenizer.

A row is an object with these keys; other keys are ignored:
    prompt      a string, or a list of chat messages {"role": ..., "content": ...}
    label       a string: what the reward compares a response with
    responses   optional list of {"text": ..., "source": "expert" | "teacher"}; each may have one of (token_groups.py)
                    token_scores    a finite number for each token: how much it matters
                    token_groups    an integer of 0 to 63 for each token: which cluster it is in
    metadata    optional object, handed to the reward
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pyarrow
import pyarrow.parquet

from gft_megatron.groups import Source

MAX_LINE_BYTES = 8 * 2**20
"""A longer line is a bad row; it is never held in memory whole."""

MAX_TOKEN_GROUPS = 64
"""Losses have a sum for each (losses/sft_go.py)."""

_RECORDED_SOURCES = {"expert": Source.EXPERT, "teacher": Source.TEACHER}
_PARQUET_MAGIC = b"PAR1"
_UTF8_BOM = b"\xef\xbb\xbf"
_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class BadRow(Exception):
    """A row that cannot be used, and why."""


@dataclass(frozen=True, slots=True)
class RowResponse:
    """A recorded response, with a number for each of its tokens, where the data have them."""

    text: str
    source: Source
    token_scores: list[float] | None = None
    token_groups: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the right form, not yet tokenised."""

    prompt: str | list[dict[str, str]]
    label: str
    responses: tuple[RowResponse, ...]
    metadata: str  # a JSON object


def read_rows(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    """Yield (line number from 1, row or what is wrong with it). In a Parquet file the line is the row's number.

    A byte order mark, CRLF line ends and blank lines are tolerated.

    Raises:
        ValueError: the file cannot be read at all.
    """
    for number, value in read_values(path):
        try:
            yield number, check_row(value)
        except BadRow as bad:
            yield number, bad


def read_values(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of `read_rows` before `check_row`: what JSON says, or a BadRow where it is none.

    Raises:
        ValueError: the file cannot be read at all.
    """
    try:
        with path.open("rb") as file:
            is_parquet = file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
            file.seek(0)
            yield from _parquet_values(file) if is_parquet else _json_values(file)
    except (OSError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"data file {path} cannot be read: {reason}") from None


def check_row(value: Any) -> Row:
    """The row that this parsed JSON value describes.

    Raises:
        BadRow: a key is missing, empty or of the wrong type.
    """
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, dict):
        raise BadRow(f"the row is {_kind(value)}, not an object")
    for key in ("prompt", "label"):
        if key not in value:
            raise BadRow(f"{key} is missing")
    prompt = value["prompt"]
    return Row(
        prompt=_messages(prompt) if isinstance(prompt, list) else _text(prompt, "prompt"),
        label=_text(value["label"], "label"),
        responses=_responses(value.get("responses")),
        metadata=_metadata(value.get("metadata")),
    )


def _json_values(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    if file.read(len(_UTF8_BOM)) != _UTF8_BOM:
        file.seek(0)
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield number, BadRow(f"the line is longer than {MAX_LINE_BYTES} bytes")
        elif line.strip():
            yield number, _json_value(line)


def _json_value(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BadRow(f"bad JSON: {error}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parquet_values(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    parquet = pyarrow.parquet.ParquetFile(file)
    wanted = [name for name in ("prompt", "label", "responses", "metadata") if name in parquet.schema_arrow.names]
    number = 0
    for batch in parquet.iter_batches(batch_size=512, columns=wanted):
        for value in batch.to_pylist():
            number += 1
            yield number, value


def _messages(value: list[Any]) -> list[dict[str, str]]:
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadRow(f"prompt[{i}] is {_kind(message)}, not a message {{role, content}}")
        for key in ("role", "content"):
            if key not in message:
                raise BadRow(f"prompt[{i}].{key} is missing")
        role = _text(message["role"], f"prompt[{i}].role")
        messages.append({"role": role, "content": _text(message["content"], f"prompt[{i}].content")})
    if not messages:
        raise BadRow("prompt is empty")
    return messages


def _responses(value: Any) -> tuple[RowResponse, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadRow(f"responses is {_kind(value)}, not a list")
    responses = []
    for i, response in enumerate(value):
        if not isinstance(response, dict):
            raise BadRow(f"responses[{i}] is {_kind(response)}, not {{text, source}}")
        for key in ("text", "source"):
            if key not in response:
                raise BadRow(f"responses[{i}].{key} is missing")
        text = _text(response["text"], f"responses[{i}].text")
        source = _text(response["source"], f"responses[{i}].source")
        if source not in _RECORDED_SOURCES:
            raise BadRow(f"responses[{i}].source is {source[:40]!r}, not one of {', '.join(_RECORDED_SOURCES)}")
        scores, groups = (response.get(key) for key in ("token_scores", "token_groups"))
        if scores is not None and groups is not None:
            raise BadRow(f"responses[{i}] has both token_scores and token_groups: keep one of them")
        _check_tokens(scores, f"responses[{i}].token_scores", _is_score, "a finite number")
        _check_tokens(groups, f"responses[{i}].token_groups", _is_group, f"an integer of 0 to {MAX_TOKEN_GROUPS - 1}")
        responses.append(RowResponse(text, _RECORDED_SOURCES[source], scores, groups))
    return tuple(responses)


def _check_tokens(values: Any, name: str, is_right: Callable[[Any], bool], expected: str) -> None:
    if values is None:
        return
    if not isinstance(values, list):
        raise BadRow(f"{name} is {_kind(values)}, not a list")
    wrong = next((i for i, value in enumerate(values) if not is_right(value)), None)
    if wrong is not None:
        raise BadRow(f"{name}[{wrong}] is {str(values[wrong])[:40]}, not {expected}")


def _is_score(value: Any) -> bool:
    # JSON's integers have no end, floats have.
    return math.isfinite(value) if type(value) is float else type(value) is int and abs(value) < 2**63


def _is_group(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_TOKEN_GROUPS


def _metadata(value: Any) -> str:
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise BadRow(f"metadata is {_kind(value)}, not an object")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:  # Parquet has types that JSON has not: dates, bytes, NaN
        raise BadRow(f"metadata is not JSON: {error}") from None
    return _encodable(text, "metadata")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {_kind(value)}, not a string")
    if not value.strip():
        raise BadRow(f"{name} is empty")
    if "\0" in value:
        raise BadRow(f"{name} has a NUL character")
    return _encodable(value, name)


def _encodable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name} has a lone surrogate") from None
    return text


def _kind(value: Any) -> str:
    return _JSON_NAMES.get(type(value), type(value).__name__)
