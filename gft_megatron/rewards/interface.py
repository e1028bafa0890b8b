"""What every reward is: response and label in, a finite number or an error out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

RewardErrorKind = Literal["timeout", "crash", "bad value"]


class RewardError(Exception):
    """A response that could not be scored. It is dropped: a made-up 0 would bias its whole group."""

    def __init__(self, kind: RewardErrorKind, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Reward(ABC):
    """Scores responses. Used in one event loop; many `score` calls may be awaited together."""

    @abstractmethod
    async def score(self, response: str, label: str, metadata: Mapping[str, Any]) -> float:
        """A finite score of the response.

        Args:
            label, metadata: of the data row.

        Raises:
            RewardError: there is no score.
        """

    async def close(self) -> None:  # noqa: B027  nothing to free, by default
        """Free what the reward holds."""
