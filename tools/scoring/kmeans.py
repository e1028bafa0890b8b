"""k-means, started by k-means++ (Arthur and Vassilvitskii 2007)."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_ROUNDS = 100


def k_means(points: Tensor, k: int, generator: torch.Generator) -> Tensor:  # [n, h] -> [k, h]
    """Centers of k clusters. A cluster that loses all its points keeps its center.

    Raises:
        ValueError: there are fewer than k different points.
    """
    centers = _spread(points, k, generator)
    for _ in range(_MOST_ROUNDS):
        nearest = nearest_center(points, centers)
        counts = torch.bincount(nearest, minlength=k)[:, None]
        means = torch.zeros_like(centers).index_add_(0, nearest, points) / counts.clamp(min=1)
        moved = torch.where(counts > 0, means, centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    return centers


def nearest_center(points: Tensor, centers: Tensor) -> Tensor:  # [n, h], [k, h] -> [n] int64
    """Which center is nearest to each point; the first of equal ones."""
    return torch.cdist(points, centers).argmin(1)


def _spread(points: Tensor, k: int, generator: torch.Generator) -> Tensor:  # [n, h] -> [k, h]
    """Points drawn one after the other, each with a probability like its squared distance from those before."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distances = torch.full((len(points),), torch.inf)
    while len(chosen) < k:
        distances = torch.minimum(distances, (points - points[chosen[-1]]).square().sum(1))
        if not distances.any():
            raise ValueError(f"--num-clusters {k}: the sample has only {len(chosen)} different hidden states")
        chosen.append(int(torch.multinomial(distances, 1, generator=generator)))
    return points[chosen]
