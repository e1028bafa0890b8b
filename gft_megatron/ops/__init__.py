"""The compiled operators and what is differentiable on top of them. Only this room touches torch.ops.gft_megatron."""

from gft_megatron.ops.library import balanced_partition, build_info
from gft_megatron.ops.linear_log_probs import linear_log_probs
from gft_megatron.ops.linear_loss import linear_loss
from gft_megatron.ops.log_probs import vocab_parallel_log_probs

__all__ = ["balanced_partition", "build_info", "linear_log_probs", "linear_loss", "vocab_parallel_log_probs"]
