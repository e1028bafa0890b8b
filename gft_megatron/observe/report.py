"""One picture of a run, drawn from its metrics.jsonl: a panel for each question that one asks of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from gft_megatron.observe.metrics import Record, read_metrics
from gft_megatron.observe.stages import split_step_time

_BLUE, _ORANGE, _GREEN, _PURPLE, _RED, _GREY = "#2f6fde", "#e8873a", "#2a9d72", "#8a5cd1", "#d1495b", "#9aa3af"
_INK, _QUIET_INK, _GRID = "#1f2937", "#6b7280", "#e8eaee"
_SOURCES = (("expert", "expert", _GREEN), ("teacher", "teacher", _ORANGE), ("self", "own samples", _BLUE))
_STAGE_LABELS = {
    "generate": "generate samples",
    "reward": "score",
    "exchange": "exchange samples",
    "update_weights": "weights to engine",
    "old_log_probs": "old log-probs",
    "forward_backward": "forward, backward",
    "optimizer": "optimizer",
    "evaluate": "evaluate",
    "save": "save",
    "other": "other",
}
_STAGE_COLORS = {
    **dict.fromkeys(("generate", "reward", "exchange", "update_weights"), _BLUE),
    **dict.fromkeys(("old_log_probs", "forward_backward", "optimizer"), _ORANGE),
}


def write_curves(metrics_jsonl: Path | str, png_path: Path | str) -> None:
    """Draw the curves of a run. Panels without data are left out; a run without any gets a picture that says so.

    Raises:
        ValueError: a line of metrics.jsonl cannot be read.
    """
    records = read_metrics(metrics_jsonl)
    panels = [panel for has_data, panel in _PANELS if has_data(records)] or [_nothing]
    num_columns = min(3, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure(figsize=(4.7 * num_columns, 3.3 * num_rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # no pyplot: it would keep the figure in a global list and may look for a display
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.06)
    for position, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, num_columns, position)
        _plain_frame(axes)
        panel(axes, records)
    figure.savefig(png_path, dpi=130)


def series(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and values [n] of one figure, from the lines that have it."""
    points = [(record["step"], record[name]) for record in records if name in record]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, np.float64), np.array(values, np.float64)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window around each point [n] -> [n], a twelfth of the curve wide and shorter at both ends.

    Non-finite values are left out of the means; a window of nothing else gives NaN.
    """
    half = len(values) // 24
    finite = np.isfinite(values)
    window = np.ones(2 * half + 1)
    total = np.convolve(np.where(finite, values, 0.0), window)[half : half + len(values)]
    number = np.convolve(finite.astype(np.float64), window)[half : half + len(values)]
    return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0)


def _has(*prefixes: str) -> Callable[[Sequence[Record]], bool]:
    def has_data(records: Sequence[Record]) -> bool:
        figures = ((name, value) for record in records for name, value in record.items())
        return any(name.startswith(prefixes) and math.isfinite(value) for name, value in figures)

    return has_data


def _plain_frame(axes: Axes) -> None:
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GREY)
    axes.tick_params(colors=_QUIET_INK, labelsize=8, length=3)


def _label(axes: Axes, title: str, ylabel: str = "", *, xlabel: str = "step", color: str = _QUIET_INK) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.set_xlabel(xlabel, fontsize=9, color=_QUIET_INK)
    axes.set_ylabel(ylabel, fontsize=9, color=color)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=xlabel == "step"))


def _legend(axes: Axes, handles: list[Any]) -> None:
    if handles:
        axes.legend(handles=handles, fontsize=8, frameon=False, labelcolor=_INK, loc="best")


def _curve(axes: Axes, records: Sequence[Record], name: str, color: str, label: str = "") -> list[Any]:
    """A smooth line over the faint raw one. Returns the legend's handle, if there is such a figure."""
    steps, values = series(records, name)
    if not np.isfinite(values).any():
        return []
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.9)
    return axes.plot(steps, smooth(values), color=color, linewidth=1.9, label=label)


def _start_at_zero(axes: Axes) -> None:
    highest = axes.dataLim.y1
    axes.set_ylim(0, 1.1 * highest if math.isfinite(highest) and highest > 0 else 1)


def _right_axis(axes: Axes, ylabel: str, color: str) -> Axes:
    right = axes.twinx()
    for side in ("top", "left", "bottom"):
        right.spines[side].set_visible(False)
    right.spines["right"].set_color(_GREY)
    right.tick_params(colors=_QUIET_INK, labelsize=8, length=3)
    right.set_ylabel(ylabel, fontsize=9, color=color)
    return right


def _loss(axes: Axes, records: Sequence[Record]) -> None:
    _curve(axes, records, "train/loss", _BLUE)
    _label(axes, "Loss and likelihood", "loss", color=_BLUE)
    if _has("train/nll")(records):
        # A loss weighted by advantages lies around 0, far from the NLL: each has its own scale.
        _curve(_right_axis(axes, "NLL per token", _ORANGE), records, "train/nll", _ORANGE)


def _reward(axes: Axes, records: Sequence[Record]) -> None:
    handles = []
    for source, label, color in _SOURCES:
        handles += _curve(axes, records, f"rollout/reward_mean_{source}", color, label)
    if not handles:
        handles = _curve(axes, records, "rollout/reward_mean", _BLUE, "all samples")
    _label(axes, "Reward by source", "mean reward")
    _legend(axes, handles)


def _accuracy(axes: Axes, records: Sequence[Record]) -> None:
    names = sorted({name for record in records for name in record if name.startswith("eval/accuracy_")})
    handles = []
    for name, color in zip(names, (_BLUE, _PURPLE, _GREEN, _ORANGE), strict=False):
        steps, values = series(records, name)
        handles += axes.plot(
            steps,
            values,
            color=color,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            linewidth=1.9,
            label=f"{name.removeprefix('eval/accuracy_')}: {values[0]:.1%} to {values[-1]:.1%}",
        )
    _start_at_zero(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _label(axes, "Held-out accuracy", "share solved")
    _legend(axes, handles)


def _entropy(axes: Axes, records: Sequence[Record]) -> None:
    _curve(axes, records, "train/entropy_mean", _GREEN)
    _start_at_zero(axes)
    _label(axes, "Entropy of the policy", "nats per token")


def _grad_norm(axes: Axes, records: Sequence[Record]) -> None:
    _curve(axes, records, "train/grad_norm", _RED)
    _start_at_zero(axes)
    _label(axes, "Gradient", "norm before clipping", color=_RED)
    if _has("train/rectified_frac")(records):
        right = _right_axis(axes, "rectified tokens", _PURPLE)
        _curve(right, records, "train/rectified_frac", _PURPLE)
        _start_at_zero(right)
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _time(axes: Axes, records: Sequence[Record]) -> None:
    names = {name for record in records for name in record if name.startswith("time/")}
    totals = {name: float(np.nansum(series(records, name)[1])) for name in names}
    stages = split_step_time(totals)
    whole = sum(stages.values())
    labels = [_STAGE_LABELS[stage] for stage in stages]
    shares = [seconds / whole for seconds in stages.values()]
    colors = [_STAGE_COLORS.get(stage, _GREY) for stage in stages]
    bars = axes.barh(labels, shares, color=colors, height=0.62)
    axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=4, fontsize=8, color=_QUIET_INK)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, max(shares) * 1.18)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _label(
        axes,
        "Where the time went",
        xlabel=f"share of {whole:.0f} s" if whole < 600 else f"share of {whole / 60:.0f} min",
    )


def _nothing(axes: Axes, records: Sequence[Record]) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "no figures in metrics.jsonl", ha="center", va="center", color=_QUIET_INK)


_PANELS: list[tuple[Callable[[Sequence[Record]], bool], Callable[[Axes, Sequence[Record]], None]]] = [
    (_has("train/loss", "train/nll"), _loss),
    (_has("rollout/reward_mean"), _reward),
    (_has("eval/accuracy_"), _accuracy),
    (_has("train/entropy_mean"), _entropy),
    (_has("train/grad_norm"), _grad_norm),
    (_has("time/step_sec"), _time),
]
