"""Mathematical equality of final answers, by math-verify in worker processes that can be killed.

SymPy and LaTeX parsers hang and eat memory on some model text, so they never run in this process. Most answers need
no parser at all: the same text, or two plain numbers, are decided here.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from gft_megatron.rewards.exact import extract_answer, find_marked_answer, normalize_answer
from gft_megatron.rewards.interface import Reward
from gft_megatron.rewards.workers import WorkerPool

# Longer answers are compared as text only: they are a model's loop, not mathematics, and would each cost a worker its
# whole time limit.
_MAX_PARSED_CHARS = 1000
_MAX_PROSE_CHARS = 100
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
# Words, which math-verify reads as products of letters: it finds "east" equal to "seat". Shorter ones may be products.
_WORDS = re.compile(r"[A-Za-z][A-Za-z ]{2,}[A-Za-z]")
_NUMBER_WITH_UNIT = re.compile(r"([^A-Za-z\\]*[0-9])\s+([A-Za-z]{2,}[A-Za-z ]*)")


class MathReward(Reward):
    """1.0 if the response's final answer equals the label's, else 0.0.

    Args:
        num_workers: processes, started when they are first needed.
        timeout_sec: wall time for one answer.
        max_memory_bytes: resident memory of one worker.

    Raises:
        ValueError: math-verify is not installed.
    """

    def __init__(self, *, num_workers: int = 2, timeout_sec: float = 5.0, max_memory_bytes: int = 2**30) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("--rm-type math needs the package math-verify: pip install math-verify")
        self._pool = WorkerPool(num_workers, timeout_sec=timeout_sec, max_memory_bytes=max_memory_bytes)

    async def score(self, response: str, label: str, metadata: Mapping[str, Any]) -> float:
        marked = find_marked_answer(response)
        given = normalize_answer(extract_answer(response) if marked is None else marked)
        expected = normalize_answer(extract_answer(label))
        verdict = decide_without_parsing(given, expected)
        if verdict is None:
            readings = [_as_latex(given)] if marked is not None or len(given) <= _MAX_PROSE_CHARS else []
            if marked is None:
                readings.append(given)  # a sentence: math-verify looks for the answer in it
            verdict = await self._pool.are_equal(_as_latex(expected), readings)
        return float(verdict)

    async def close(self) -> None:
        await self._pool.close()


def decide_without_parsing(given: str, expected: str) -> bool | None:
    """Whether two normalised answers are equal; None if that takes a parser."""
    if given == expected:
        return True
    if not given or max(len(given), len(expected)) > _MAX_PARSED_CHARS:
        return False
    if _WORDS.fullmatch(given) and _WORDS.fullmatch(expected):
        return given.casefold() == expected.casefold()
    if _NUMBER.fullmatch(given) and _NUMBER.fullmatch(expected):
        return Decimal(given) == Decimal(expected)
    return None


def _as_latex(answer: str) -> str:
    r"""In a box, which math-verify reads first and whole; "18 dollars" as 18\text{ dollars}, not letters multiplied."""
    unit = _NUMBER_WITH_UNIT.fullmatch(answer)
    return f"\\boxed{{{answer}}}" if unit is None else f"\\boxed{{{unit[1]}\\text{{ {unit[2]}}}}}"
