"""Group advantages: how much better a response scored than the others to the same prompt."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from gft_megatron.ops.library import row_ops

AdvantageNormalization = Literal["std", "none", "leave-one-out"]


def group_advantages(
    rewards: Tensor,  # [num_samples]
    group_ids: Tensor,  # [num_samples] int64
    *,
    normalize: AdvantageNormalization = "std",
    ddof: int = 1,
    eps: float = 1e-6,
) -> Tensor:  # [num_samples] fp32
    """A_k = (R_k - mean_R) / (std_R + eps) inside each group (arXiv:2604.14258 Eq. 4; GRPO).

    Args:
        rewards: finite scores.
        group_ids: equal inside a group; any integers, in any order.
        normalize: "std" as above; "none" leaves the division out (Dr. GRPO). "leave-one-out" is R_k minus the mean of
            the others, n / (n - 1) times "none" (RLOO, arXiv:2402.14740).
        ddof: 1 divides the variance by n - 1 (the official GFT code), 0 by n.
        eps: added to the standard deviation.

    A group whose rewards are all equal gets exactly 0. A group of one keeps its reward: the official code gives it
    mean 0 and deviation 1, so that |G| = 1 with reward 1 is plain SFT.

    Raises:
        ValueError: shapes differ, group_ids are not integers, a reward is not finite, or `normalize` is unknown.
        RuntimeError: CUDA rewards without the CUDA operators.
    """
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards and group_ids must be one-dimensional and alike, "
            f"got {list(rewards.shape)}, {list(group_ids.shape)}"
        )
    if group_ids.is_floating_point():
        raise ValueError(f"group_ids must be integers, got {group_ids.dtype}")
    if normalize not in get_args(AdvantageNormalization):
        raise ValueError(f"normalize must be one of {get_args(AdvantageNormalization)}, got {normalize!r}")
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite, got {rewards[~torch.isfinite(rewards)].tolist()}")

    order = group_ids.argsort(stable=True)  # the operator wants each group in one stretch
    scaled = rewards.double() * _leave_one_out(group_ids) if normalize == "leave-one-out" else rewards.double()
    sorted_advantages = row_ops(rewards.device).group_advantages(
        scaled[order], group_ids.long()[order], normalize == "std", ddof, eps
    )
    return torch.empty_like(sorted_advantages).index_copy_(0, order, sorted_advantages)


def _leave_one_out(group_ids: Tensor) -> Tensor:  # [num_samples] -> [num_samples] fp64
    """n / (n - 1) of a sample's group of n; 1 in a group of one."""
    _, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    return (sizes.double() / (sizes - 1).clamp(min=1))[group]
