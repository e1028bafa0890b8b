"""The compiled operators and what is differentiable on top of them. Only this room touches torch.ops.gft_megatron."""

from gft_megatron.ops.library import balanced_partition, build_info
from gft_megatron.ops.log_probs import vocab_parallel_log_probs

__all__ = ["balanced_partition", "build_info", "vocab_parallel_log_probs"]
