"""How far behind the weights were that a sample was drawn with, in rollouts."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from gft_megatron.groups import Batch

_LONGEST = 100


class TrainedVersions:
    """The versions of the weights that the newest rollouts were trained on, or are being trained on."""

    def __init__(self, versions: list[int] | None = None) -> None:
        self.versions = versions or []

    def add(self, version: int) -> None:
        """The weights that the next rollout is trained on."""
        known = [v for v in self.versions if v < version]
        self.versions = [*known[-_LONGEST:], version]

    def staleness(self, batch: Batch) -> Tensor:  # [n] int64
        """Rollouts trained since the oldest token of each sample was drawn; 0 for recorded responses."""
        behind = [
            0 if version < 0 else len(self.versions) - bisect_right(self.versions, version)
            for version in batch.weight_versions.tolist()
        ]
        return torch.tensor(behind, dtype=torch.int64)

    def oldest_allowed(self, max_staleness: int, *, newest: int, rollouts_before: int) -> int:
        """The oldest weights of which tokens may be, for a rollout that is trained on after `rollouts_before` others.

        Args:
            newest: the version that tokens are drawn with now.
        """
        trained_since = max_staleness - rollouts_before
        if trained_since < 0:
            return newest
        return self.versions[-1 - trained_since] if trained_since < len(self.versions) else -1
