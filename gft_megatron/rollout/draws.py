"""Which groups are made next: those that a rollout has left for later come first, then new rows.

All of it is known to all ranks alike, so each knows who makes which group without a word from the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gft_megatron.data.order import PromptOrder
from gft_megatron.groups import GroupKey


@dataclass(frozen=True, slots=True)
class Draw:
    """A group to make."""

    key: GroupKey
    group_id: int
    """In the batch of this rollout; the key's own, unless the group was begun in an earlier one."""
    row: int
    owner: int = 0
    """Which of the collectors makes it. It keeps what it has of a group that is left for later."""


class DrawQueue:
    """Hands out draws, and remembers those that nobody is done with."""

    def __init__(self, num_collectors: int) -> None:
        self._num_collectors = num_collectors
        self._left: list[Draw] = []
        self._given_back: list[int] = []
        """Rows that were drawn for nothing."""
        self._planned: deque[tuple[int, list[Draw]]] = deque()
        """Rollouts that a run before this one had begun, by their numbers."""

    def first(self, order: PromptOrder, rollout_id: int, number: int) -> list[Draw]:
        """What a rollout begins with; the same again where a run before this one had begun it."""
        if self._planned and self._planned[0][0] == rollout_id:
            return self._planned.popleft()[1]
        return self.more(order, rollout_id, number)

    def more(self, order: PromptOrder, rollout_id: int, number: int, *, first_id: int = 0) -> list[Draw]:
        """The next draws of a rollout that has had `first_id` of them."""
        left, self._left = self._left[:number], self._left[number:]
        draws = [replace(draw, group_id=i) for i, draw in enumerate(left, first_id)]
        wanted = number - len(left)
        rows, self._given_back = self._given_back[:wanted], self._given_back[wanted:]
        for i, row in enumerate([*rows, *order.take(wanted - len(rows))], first_id):
            draws.append(Draw(GroupKey(rollout_id, i), first_id + len(draws), row, len(draws) % self._num_collectors))
        return draws

    def leave(self, draws: Iterable[Draw]) -> None:
        """They come first in the next rollout, and go to the same collectors."""
        self._left = sorted([*self._left, *draws], key=lambda draw: draw.key)

    def give_back(self) -> list[Draw]:
        """Groups that were left will not be made; their rows are drawn again, under other keys. Returns those draws."""
        left, self._left = self._left, []
        self._given_back += [draw.row for draw in left]
        return left

    def forget_planned(self) -> None:
        self._planned.clear()

    def state_dict(self, ahead: Iterable[tuple[int, Sequence[Draw]]]) -> dict[str, Any]:
        """
        Args:
            ahead: rollouts that are begun, by their numbers.
        """
        return {
            "ahead": [[rollout_id, list(map(_named_row, draws))] for rollout_id, draws in ahead],
            "left": list(map(_named_row, self._left)),
            "given_back": self._given_back,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._planned = deque((rollout_id, self._dealt(named_rows)) for rollout_id, named_rows in state["ahead"])
        self._left = self._dealt(state["left"])
        self._given_back = state.get("given_back", [])  # not in a checkpoint of an earlier version

    def _dealt(self, named_rows: Sequence[Sequence[int]]) -> list[Draw]:
        """In a new run nobody holds a part of these, and the collectors may be others."""
        return [
            Draw(GroupKey(first_rollout, number), i, row, i % self._num_collectors)
            for i, (first_rollout, number, row) in enumerate(named_rows)
        ]


def _named_row(draw: Draw) -> list[int]:
    return [draw.key.rollout_id, draw.key.group_id, draw.row]
