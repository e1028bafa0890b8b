"""Reward of the countdown task: is this an expression of exactly the three digits that gives the target?

--rm-type examples/countdown_reward.py:score
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_EXPRESSION = re.compile(r"[1-9][-+*][1-9][-+*][1-9]", re.ASCII)


def score(response: str, label: str, metadata: Mapping[str, Any]) -> float:
    """1.0 for a right expression, else 0.0. metadata: digits (three), target."""
    if _EXPRESSION.fullmatch(response) is None:
        return 0.0
    uses_the_digits = sorted(map(int, response[::2])) == sorted(metadata["digits"])
    return float(uses_the_digits and value_of(response) == metadata["target"])


def value_of(expression: str) -> int:
    """The value of digits joined by + - *, multiplication first."""
    total, product, sign = 0, int(expression[0]), 1
    for operator, digit in zip(expression[1::2], expression[2::2], strict=True):
        if operator == "*":
            product *= int(digit)
        else:
            total += sign * product
            product, sign = int(digit), 1 if operator == "+" else -1
    return total + sign * product
