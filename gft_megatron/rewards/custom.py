"""A reward function of the user's, named on the command line. It is code that the user chose to run; data never is."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import numbers
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from gft_megatron.rewards.interface import Reward, RewardError

RewardFunction = Callable[[str, str, Mapping[str, Any]], float | Awaitable[float]]


class CustomReward(Reward):
    """What `function(response, label, metadata)` returns; it may be async, and should be if it waits for anything.

    Args:
        timeout_sec: for an async function. One that is not async cannot be stopped.
    """

    def __init__(self, function: RewardFunction, *, timeout_sec: float = 60.0) -> None:
        self._function = function
        self._timeout_sec = timeout_sec

    async def score(self, response: str, label: str, metadata: Mapping[str, Any]) -> float:
        limit = asyncio.timeout(self._timeout_sec)
        try:
            value = self._function(response, label, metadata)
            if inspect.isawaitable(value):
                async with limit:
                    value = await value
        except Exception as error:
            # The function may raise a TimeoutError of its own.
            if limit.expired():
                raise RewardError("timeout", f"no score in {self._timeout_sec:g} s") from error
            raise RewardError("crash", f"{type(error).__name__}: {error}") from error
        return _finite(value)


def load_function(name: str) -> RewardFunction:
    """The function that module:function or path/file.py:function names.

    Raises:
        ValueError: there is none.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(f"--rm-type {name}: expected exact, math, module:function or path/file.py:function")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise ValueError(f"--rm-type {name}: cannot import {place}: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"--rm-type {name}: {place} has no function {attribute}")
    return function


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path  # by its suffix, .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _finite(value: Any) -> float:
    # numbers.Real has Python's and NumPy's scalars; a tensor or a string is more likely a mistake than a score.
    if not isinstance(value, numbers.Real):
        raise RewardError("bad value", f"the reward function returned {type(value).__name__}, not a number")
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise RewardError("bad value", f"the reward function returned {score}")
    return score
