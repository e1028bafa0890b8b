"""What happened while groups were collected, and where a collection is."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class CollectCounts:
    """Added up over collectors, but for the seconds, of which the longest counts."""

    dropped_groups: int = 0
    """Groups of which a response failed for good: a group is complete or absent."""
    restored_groups: int = 0
    """Groups that a run before this one had finished."""
    stale_groups: int = 0
    """Finished groups that were left out because their weights were too old."""
    refilled_samples: int = 0
    """Own samples drawn because a recorded response was missing."""
    failed_samples: int = 0
    reward_errors: int = 0
    resumed_samples: int = 0
    """Own samples that went on from what an earlier rollout had drawn of them."""
    generate_sec: float = 0.0
    reward_sec: float = 0.0

    def add(self, other: CollectCounts) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass
class CollectNews:
    """Where a collection is, for whoever watches it."""

    num_draws: int = 0
    num_groups: int = 0
    num_dropped: int = 0
    num_in_flight: int = 0
