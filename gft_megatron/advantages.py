"""Group advantages: how much better a response scored than the others to the same prompt."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

AdvantageNormalization = Literal["std", "none"]


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
        normalize: "std" as above; "none" leaves the division out (Dr. GRPO).
        ddof: 1 divides the variance by n - 1 (the official GFT code), 0 by n.
        eps: added to the standard deviation.

    A group whose rewards are all equal gets exactly 0. A group of one keeps its reward: the official code gives it
    mean 0 and deviation 1, so that |G| = 1 with reward 1 is plain SFT.

    Raises:
        ValueError: shapes differ, a reward is not finite, or `normalize` is unknown.
    """
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards and group_ids must be one-dimensional and alike, "
            f"got {list(rewards.shape)}, {list(group_ids.shape)}"
        )
    if normalize not in get_args(AdvantageNormalization):
        raise ValueError(f"normalize must be one of {get_args(AdvantageNormalization)}, got {normalize!r}")
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite, got {rewards[~torch.isfinite(rewards)].tolist()}")

    values = rewards.double()
    _, group = group_ids.unique(return_inverse=True)  # [num_samples] in 0..num_groups-1
    size = torch.bincount(group)  # [num_groups]

    def mean_of(x: Tensor, divisor: Tensor) -> Tensor:
        return torch.zeros(len(size), dtype=x.dtype, device=x.device).index_add_(0, group, x) / divisor

    centred = values - mean_of(values, size)[group]
    lowest = torch.full((len(size),), torch.inf, dtype=values.dtype, device=values.device)
    highest = -lowest
    lowest = lowest.scatter_reduce(0, group, values, "amin")
    highest = highest.scatter_reduce(0, group, values, "amax")
    # Rounding of the mean leaves residues of 1e-17 in a group of equal rewards, which eps does not tame when it is 0.
    centred = torch.where((lowest == highest)[group], 0.0, centred)
    if normalize == "std":
        variance = mean_of(centred.square(), (size - ddof).clamp(min=1))
        centred = centred / (variance.sqrt() + eps)[group]
        centred = torch.nan_to_num(centred, nan=0.0)  # 0 / 0 where eps is 0 and the rewards are equal
    return torch.where((size == 1)[group], values, centred).float()
