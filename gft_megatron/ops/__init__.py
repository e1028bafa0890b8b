"""The compiled operators and what is differentiable on top of them. Only this room touches torch.ops.gft_megatron."""

from gft_megatron.ops.kl import vocab_parallel_kl
from gft_megatron.ops.library import balanced_partition, build_info
from gft_megatron.ops.linear_log_probs import linear_log_probs
from gft_megatron.ops.linear_loss import linear_loss
from gft_megatron.ops.log_probs import vocab_parallel_log_probs
from gft_megatron.ops.rectified import rectified_cross_entropy
from gft_megatron.ops.segments import segment_means, segment_sums
from gft_megatron.ops.top_entropy import vocab_parallel_top_entropy

__all__ = [
    "balanced_partition",
    "build_info",
    "linear_log_probs",
    "linear_loss",
    "rectified_cross_entropy",
    "segment_means",
    "segment_sums",
    "vocab_parallel_kl",
    "vocab_parallel_log_probs",
    "vocab_parallel_top_entropy",
]
