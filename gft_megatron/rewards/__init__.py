"""Scores of responses: exact match, mathematical equality, or a function of the user's."""

from __future__ import annotations

from gft_megatron.rewards.custom import CustomReward, load_function
from gft_megatron.rewards.exact import ExactReward
from gft_megatron.rewards.interface import Reward, RewardError
from gft_megatron.rewards.math import MathReward

__all__ = ["Reward", "RewardError", "build_reward"]


def build_reward(rm_type: str) -> Reward:
    """The reward that --rm-type names: exact, math, module:function or path/file.py:function.

    Raises:
        ValueError: there is no such reward.
    """
    if rm_type == "exact":
        return ExactReward()
    if rm_type == "math":
        return MathReward()
    return CustomReward(load_function(rm_type))
