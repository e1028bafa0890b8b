"""Where the final answer is found, what counts as the same text, and the reward made of both."""

from __future__ import annotations

import asyncio

import pytest

from gft_megatron.rewards import build_reward
from gft_megatron.rewards.exact import extract_answer, last_boxed, normalize_answer


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{3} or rather \boxed{4}. A: 5", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed { \{1, 2\} } ", r"\{1, 2\}"),
        (r"\boxed{3} and \boxed{4", "3"),  # cut off in the middle
        (r"\boxed{\boxed{7}}", "7"),
        (r"}} {\boxed{8}", "8"),
        ("1 + 1 = 2\n#### 2", "2"),
        ("#### 2\n#### 3\nA: 4", "3"),
        ("#### 2\nand so on", "2"),
        ("so\nA: 18", "18"),
        ("Final answer: 19 ", "19"),
        ("PLAN A: go\nAnswer: 20\nthen\nanswer:21\n", "21"),
        ("NASA: 7\nseven", "seven"),  # "A:" counts at the start of a line only
        ("first\n last line \n\n", "last line"),
        ("", ""),
    ],
)
def test_extracted_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "answer, normal",
    [
        (" 18. ", "18"),
        ("$1,234,567.50", "1234567.50"),
        (r"\$5", "5"),
        ("$x^2$", "x^2"),
        ("\u22123", "-3"),
        ("(1,2)", "(1,2)"),
        ("1,23", "1,23"),
    ],
)
def test_normalized_answer(answer: str, normal: str) -> None:
    assert normalize_answer(answer) == normal


def test_reward_compares_final_answers() -> None:
    reward = build_reward("exact")

    def score(response: str, label: str) -> float:
        return asyncio.run(reward.score(response, label, {}))

    assert score("It is $1,000.\n#### 1,000", "1000") == 1.0
    assert score("A: 18", "Janet has 9 * 2 = 18.\n#### 18") == 1.0
    assert score("A: 18.0", "18") == 0.0  # the same number, but not the same text
    assert score("", "18") == 0.0


def test_thousands_of_braces_take_linear_time() -> None:
    deep = "{" * 200_000 + "5" + "}" * 200_000
    assert last_boxed("\\boxed" + deep) == deep[1:-1]
    assert last_boxed("\\boxed{" * 200_000) is None
