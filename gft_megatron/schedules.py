"""Hyper-parameters that change over a run: `mu=0.9:0.05:cosine:200`.

A schedule is NAME=START:END:SHAPE[:STEPS[:WARMUP]]. The value is START for WARMUP steps (default 0), then goes to END
in STEPS steps (default: the rest of the phase) and stays there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_SHAPES = ("linear", "cosine", "step")


@dataclass(frozen=True)
class Schedule:
    start: float
    end: float
    shape: str
    steps: int | None = None
    """None: to the end of the phase."""
    warmup: int = 0

    def at(self, step: int, num_steps: int) -> float:
        """The value in step `step` (from 0) of a phase of `num_steps`."""
        length = max(num_steps - self.warmup - 1, 1) if self.steps is None else max(self.steps, 1)
        done = min(max((step - self.warmup) / length, 0.0), 1.0)
        if self.shape == "step":
            done = float(done == 1.0)
        elif self.shape == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2.0
        return self.start + (self.end - self.start) * done


def parse_schedules(assignments: tuple[str, ...] | list[str]) -> dict[str, Schedule]:
    """Schedules by the name of what they set.

    Raises:
        ValueError: one is not of the form above, or two are of the same number.
    """
    schedules: dict[str, Schedule] = {}
    for name, schedule in map(_parse, assignments):
        if name in schedules:
            raise ValueError(f"--schedule {name}: given twice")
        schedules[name] = schedule
    return schedules


def _parse(assignment: str) -> tuple[str, Schedule]:
    complaint = ValueError(
        f"--schedule {assignment}: expected NAME=START:END:SHAPE[:STEPS[:WARMUP]] with a SHAPE of {', '.join(_SHAPES)}"
    )
    name, equals, text = assignment.partition("=")
    parts = text.split(":")
    if not name or not equals or not 3 <= len(parts) <= 5 or parts[2] not in _SHAPES:
        raise complaint
    try:
        start, end = float(parts[0]), float(parts[1])
        steps, warmup = (int(parts[3]) if len(parts) > 3 else None), (int(parts[4]) if len(parts) > 4 else 0)
    except ValueError:
        raise complaint from None
    if not (math.isfinite(start) and math.isfinite(end)) or (steps is not None and steps < 1) or warmup < 0:
        raise complaint
    return name.replace("-", "_"), Schedule(start, end, parts[2], steps, warmup)
