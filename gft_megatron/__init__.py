"""Group Fine-Tuning and its family of losses for Megatron-Core."""

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
