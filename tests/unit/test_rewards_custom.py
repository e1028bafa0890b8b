"""A user's function is called as promised, and what is no score is an error instead of a 0."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import CHECKOUT

from gft_megatron.rewards import Reward, RewardError, build_reward
from gft_megatron.rewards.custom import CustomReward


def score(reward: Reward, response: str = "r", label: str = "l", metadata: dict[str, Any] | None = None) -> float:
    return asyncio.run(reward.score(response, label, metadata or {}))


def test_function_of_a_file_and_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_reward.py").write_text(
        "def plain(response, label, metadata): return len(response) + metadata['bonus']\n"
        "async def waits(response, label, metadata): return response == label\n"
    )
    assert score(build_reward(f"{tmp_path / 'my_reward.py'}:plain"), "abc", "", {"bonus": 0.5}) == 3.5
    monkeypatch.syspath_prepend(tmp_path)
    assert score(build_reward("my_reward:plain"), "abc", "", {"bonus": -1}) == 2.0
    assert score(build_reward("my_reward:waits"), "x", "x") == 1.0


@pytest.mark.parametrize(
    "name, message",
    [
        ("maths", "--rm-type maths: expected exact, math, module:function or path/file.py:function"),
        (":f", "--rm-type :f: expected exact"),
        ("no_such_module:f", "--rm-type no_such_module:f: cannot import no_such_module: ModuleNotFoundError"),
        ("no/such/file.py:f", "--rm-type no/such/file.py:f: cannot import no/such/file.py: FileNotFoundError"),
        ("json:f", "--rm-type json:f: json has no function f"),
        ("json:__name__", "--rm-type json:__name__: json has no function __name__"),
    ],
)
def test_unknown_reward_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        build_reward(name)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [1, 0.25, True, np.float32(0.5), np.int64(3)])
def test_numbers_are_scores(value: Any) -> None:
    result = score(CustomReward(lambda *_: value))
    assert type(result) is float and result == value


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 10**400, "1.0", None, torch.tensor(1.0), [1.0]])
def test_what_is_no_finite_number_is_an_error(value: Any) -> None:
    with pytest.raises(RewardError) as error:
        score(CustomReward(lambda *_: value))
    assert error.value.kind == "bad value"


def test_exceptions_and_timeouts_are_errors() -> None:
    def breaks(*_: Any) -> float:
        raise KeyError("digits")

    async def gives_up(*_: Any) -> float:
        raise TimeoutError("its own")

    async def hangs(*_: Any) -> float:
        await asyncio.sleep(60)
        return 0.0

    for function, kind, message in [
        (breaks, "crash", "KeyError: 'digits'"),
        (gives_up, "crash", "TimeoutError: its own"),
        (hangs, "timeout", "no score in 0.05 s"),
    ]:
        with pytest.raises(RewardError, match=message) as error:
            score(CustomReward(function, timeout_sec=0.05))
        assert error.value.kind == kind


def test_countdown_reward_on_every_expression_of_its_alphabet() -> None:
    reward = build_reward(f"{CHECKOUT / 'examples/countdown_reward.py'}:score")
    digits, target = [2, 3, 4], 10
    right = set()
    for a, b, c in itertools.permutations("234"):
        for p, q in itertools.product("+-*", repeat=2):
            text = f"{a}{p}{b}{q}{c}"
            if eval(text) == target:  # the test's oracle: text of this line only
                right.add(text)
    assert right == {"2*3+4", "3*2+4", "4+2*3", "4+3*2", "3*4-2", "4*3-2"}
    for length in range(6):
        for text in map("".join, itertools.product("234+-*", repeat=length)):
            assert score(reward, text, "10", {"digits": digits, "target": target}) == float(text in right), text
    for text in ["2*3+4\n", " 2*3+4", "2*3+4+", "5+5", "2+2*4", "\u0662*3+4", "__import__('os')", "2*3+4=10"]:
        assert score(reward, text, "10", {"digits": digits, "target": target}) == 0.0
