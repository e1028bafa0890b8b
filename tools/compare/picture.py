"""The table as a picture: accuracy and diversity of each method, before GRPO and after."""

from __future__ import annotations

from pathlib import Path

from compare.methods import GRPO, GRPO_LONG, WARMUP, Row, rows
from compare.table import AVG, PASS, Figures, estimate
from matplotlib.axes import Axes

_ALONE, _THEN, _REFERENCE = "#2f6fde", "#e8873a", "#9aa3af"


def draw(figures: Figures, path: Path) -> None:
    """A line for each method: what it came to, and what GRPO made of it; small dots are seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_name = {row.name: row for row in rows()}
    then = {row.start: row for row in by_name.values() if row.method is GRPO and row.name != GRPO_LONG}
    shown = [row for row in by_name.values() if row.start == WARMUP and row.method is not GRPO]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 1.4 + 0.42 * len(shown)), sharey=True, layout="constrained")
    for axis, name in zip(axes, (AVG, PASS), strict=True):
        for place, row in enumerate(shown):
            _dots(axis, figures, row, name, place - 0.14, _ALONE)
            if row.name in then:
                _dots(axis, figures, then[row.name], name, place + 0.14, _THEN)
        long = estimate([of[name] for of in figures[GRPO_LONG].values()])
        axis.axvline(long.mean, color=_REFERENCE, linestyle="--", linewidth=1, zorder=0)
        axis.set_title(f"{name} on held-out problems", loc="left", fontsize=10)
        axis.grid(axis="x", color="#e8eaee")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(shown)), [row.title for row in shown])
    axes[0].invert_yaxis()
    marks = [
        pyplot.Line2D([], [], marker="o", linestyle="", color=_ALONE, label="method"),
        pyplot.Line2D([], [], marker="o", linestyle="", color=_THEN, label="then GRPO"),
        pyplot.Line2D([], [], linestyle="--", linewidth=1, color=_REFERENCE, label="GRPO (twice as long)"),
    ]
    figure.legend(handles=marks, frameon=False, fontsize=8, loc="outside upper right", ncols=len(marks))
    num_seeds = len(figures[WARMUP])
    figure.supxlabel(f"mean and standard error over {num_seeds} seeds, small dots are seeds", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _dots(axis: Axes, figures: Figures, row: Row, name: str, height: float, color: str) -> None:
    values = [of[name] for of in figures[row.name].values()]
    of = estimate(values)
    axis.plot(values, [height] * len(values), "o", markersize=2.5, color=color, alpha=0.4)
    axis.errorbar(of.mean, height, xerr=of.error, fmt="o", markersize=5, color=color, capsize=2, linewidth=1.4)
