"""Group Fine-Tuning and its family of losses for Megatron-Core."""

from typing import Any

from gft_megatron.advantages import group_advantages
from gft_megatron.losses import LOSSES, LossInputs
from gft_megatron.ops import linear_log_probs, linear_loss, vocab_parallel_kl, vocab_parallel_log_probs

__all__ = [
    "LOSSES",
    "LossInputs",
    "group_advantages",
    "linear_log_probs",
    "linear_loss",
    "vocab_parallel_kl",
    "vocab_parallel_log_probs",
]


def __getattr__(name: str) -> Any:
    """`hook_loss`, imported when it is asked for: all the rest works without Megatron."""
    if name != "hook_loss":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gft_megatron.training.hook import hook_loss

    return hook_loss
