"""Find the final answer of a response and compare it, as normalised text, with the label's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gft_megatron.rewards.interface import Reward

# An escaped character is one token, so that \{ of a set is no brace.
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER_LINE = re.compile(r"(?:\banswer|^\s*A)\s*:(.*)$", re.IGNORECASE | re.MULTILINE)
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_UNICODE_MINUS = "\u2212"


class ExactReward(Reward):
    """1.0 if the final answers are the same text after `normalize_answer`, else 0.0."""

    async def score(self, response: str, label: str, metadata: Mapping[str, Any]) -> float:
        given, expected = extract_answer(response), extract_answer(label)
        return float(normalize_answer(given) == normalize_answer(expected))


def extract_answer(text: str) -> str:
    """The marked answer; where there is no mark, the last line that is not blank."""
    marked = find_marked_answer(text)
    return text.strip().rpartition("\n")[2].strip() if marked is None else marked


def find_marked_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{...}, else after the last "####", else after the last "Answer:" or "A:"."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    _, mark, after = text.rpartition("####")
    if mark:
        return after.strip().partition("\n")[0].strip()
    lines = _ANSWER_LINE.findall(text)
    return lines[-1].strip() if lines else None


def normalize_answer(answer: str) -> str:
    """Without outer blanks, dollar signs, commas between thousands and a final period; the Unicode minus as "-"."""
    answer = answer.replace("\\$", "").replace("$", "").replace(_UNICODE_MINUS, "-").strip()
    return _THOUSANDS.sub("", answer).removesuffix(".").strip()


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} that is closed, without outer blanks."""
    # One pass over the braces: model text can have thousands, deep or never closed.
    open_braces: list[int | None] = []  # for each open brace, where the content starts if it is a box's
    last: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "{":
            open_braces.append(None)
        elif token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (last is None or start > last[0]):
                last = (start, match.start())
        elif token.startswith("\\boxed"):
            open_braces.append(match.end())
    return None if last is None else text[slice(*last)].strip()
