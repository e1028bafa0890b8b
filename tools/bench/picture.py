"""The table as a picture."""

from __future__ import annotations

from pathlib import Path

from bench.candidates import COPY, GEMMS, Row
from bench.settings import BenchLoss
from bench.tables import is_ours, machine


def draw(rows: list[Row], settings: BenchLoss, path: Path) -> None:
    """Horizontal bars of time, one panel for each data type and number of ranks, the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row.dtype, row.tensor_parallel) for row in rows))
    bars = [[row for row in rows if (row.dtype, row.tensor_parallel) == panel] for panel in panels]
    heights = [0.9 + 0.3 * len(group) for group in bars]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    unit = "CPU milliseconds" if settings.device == "cpu" else "milliseconds"
    for (dtype, size), group, axis in zip(panels, bars, axes[:, 0], strict=True):
        shown = [row for row in group if row.name not in (COPY, GEMMS)]
        times = [row.cost * 1e3 for row in shown]
        colours = ["#2a7f62" if is_ours(row) else "#b8bec6" for row in shown]
        places = range(len(shown))
        drawn = axis.barh(places, times, color=colours)
        axis.bar_label(drawn, [f"{value:,.1f}" if value < 100 else f"{value:,.0f}" for value in times], padding=3)
        axis.set_yticks(places, [row.name for row in shown])
        axis.invert_yaxis()
        floors = [row.cost * 1e3 * row.floor_share for row in shown if row.floor_share is not None]
        if floors:
            label = "three bare GEMMs" if settings.linear else "byte floor at copy speed"
            axis.axvline(floors[0], color="#c0392b", linestyle="--", linewidth=1, label=label)
            axis.legend(loc="lower right", frameon=False)
        axis.set_xlim(0, max(times) * 1.12)
        axis.set_title(f"{dtype}, tensor parallel {size}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"forward + backward, {unit}\n{machine(settings)}", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
