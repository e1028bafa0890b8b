"""Where the time of a step went: the measured stages, made disjoint, and the rest of the step."""

from __future__ import annotations

from collections.abc import Mapping

STAGES = (
    "generate",
    "reward",
    "exchange",
    "update_weights",
    "old_log_probs",
    "forward_backward",
    "optimizer",
    "evaluate",
    "save",
    "other",
)


def split_step_time(figures: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each stage, in the order of STAGES, stages that took none left out.

    Args:
        figures: the "time/..._sec" figures of one step, or their sums over many; other names are not looked at.

    Generating and scoring overlap, and each is reported as its longest wait. Inside "time/rollout_sec", the clock
    around both, `reward` is at most what generating left over, and the rest is `exchange`.
    """
    seconds = {stage: figures.get(f"time/{stage}_sec", 0.0) for stage in STAGES}
    if "time/rollout_sec" in figures:
        left = figures["time/rollout_sec"]
        seconds["generate"] = min(seconds["generate"], left)
        left -= seconds["generate"]
        seconds["reward"] = min(seconds["reward"], left)
        seconds["exchange"] = left - seconds["reward"]
    seconds["other"] = max(0.0, figures.get("time/step_sec", 0.0) - sum(seconds.values()))
    return {stage: value for stage, value in seconds.items() if value > 0.0}
