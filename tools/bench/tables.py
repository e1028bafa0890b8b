"""The table on a terminal, in a log and in Markdown, and what it says in ratios."""

from __future__ import annotations

import datetime
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench.candidates import COPY, GEMMS, OURS, TORCH_LINEAR, Row
from bench.settings import BenchLoss
from rich.console import Console
from rich.table import Table

from gft_megatron import ops

HEADINGS = ["", "dtype", "TP", "ms", "CPU ms", "GB/s", "of floor", "extra MB", "collectives", "max error"]


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: Callable[[float], str]) -> str:
        return "-" if value is None else form(value)

    def milliseconds(value: float) -> str:
        return f"{value * 1e3:,.1f}" if value >= 1e-3 else f"{value * 1e3:.3f}"

    return [
        row.name,
        row.dtype,
        str(row.tensor_parallel),
        milliseconds(row.seconds),
        number(row.cpu_seconds, milliseconds),
        number(row.gb_per_s, lambda x: f"{x:,.1f}"),
        number(row.floor_share, lambda x: f"{x:.0%}"),
        number(row.peak_extra_bytes, lambda x: f"{x / 1e6:,.1f}"),
        str(row.collectives),
        number(row.max_abs_error, lambda x: f"{x:.1e}"),
    ]


def ratios(rows: list[Row]) -> list[str]:
    """What the table says about ours, in words."""
    lines = []
    for dtype, size in dict.fromkeys((row.dtype, row.tensor_parallel) for row in rows):
        found = {row.name: row for row in rows if (row.dtype, row.tensor_parallel) == (dtype, size)}
        said = _linear_ratios(found) if GEMMS in found else _logits_ratios(found)
        lines += [f"{dtype} TP{size}: {text}" for text in said]
    return lines


def _logits_ratios(found: dict[str, Row]) -> Iterator[str]:
    for name, row in found.items():
        if name.startswith((f"{OURS} +", "ours one sweep")):
            yield f"{name} takes {row.cost / found[OURS].cost:.2f}x the time of {OURS}"
        elif name not in (COPY, OURS):
            yield f"{OURS} is {row.cost / found[OURS].cost:.1f}x as fast as {name}"


def _linear_ratios(found: dict[str, Row]) -> Iterator[str]:
    for name, row in found.items():
        if name in (GEMMS, TORCH_LINEAR):
            continue
        whole, comma, _ = name.partition(",")
        base = whole if comma else GEMMS
        text = f"{name} takes {row.cost / found[base].cost:.2f}x the time of {base}"
        naive = found[TORCH_LINEAR].peak_extra_bytes
        if row.peak_extra_bytes is not None and naive:
            text += f" and {row.peak_extra_bytes / naive:.2f}x the memory of {TORCH_LINEAR}"
        yield text


def machine(settings: BenchLoss) -> str:
    """One line that says what the figures belong to."""
    if settings.device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = names[0] if names else platform.machine()
    threads = f"{settings.threads} thread{'s' if settings.threads > 1 else ''} a rank"
    sizes = f"{settings.num_tokens:,} tokens, vocabulary {settings.vocab_size:,}"
    if settings.linear:
        sizes += f", hidden size {settings.hidden_size:,}"
    what = f"operators: {ops.build_info()['isa']}, " if settings.device == "cpu" else ""
    return f"{name}, {what}torch {torch.__version__}, {threads}, {datetime.date.today()}; {sizes}"


def show(rows: list[Row], reasons: list[str], settings: BenchLoss) -> None:
    """The table on standard output: in colours on a terminal, in plain aligned lines elsewhere."""
    console = Console() if sys.stdout.isatty() else Console(width=200)
    table = Table(*HEADINGS, box=None, pad_edge=False, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for before, row in zip([None, *rows], rows, strict=False):
        if before and (before.dtype, before.tensor_parallel) != (row.dtype, row.tensor_parallel):
            table.add_row()
        table.add_row(*_cells(row), style="bold" if is_ours(row) else None)
    console.print()
    console.print(machine(settings), highlight=False)
    console.print(table)
    for reason in reasons:
        console.print(f"left out: {reason}", style="dim", highlight=False, markup=False)
    for line in ratios(rows):
        console.print(line, highlight=False)


def is_ours(row: Row) -> bool:
    return "ours" in row.name or row.name.startswith("linear_")


def markdown(rows: list[Row], reasons: list[str], settings: BenchLoss) -> str:
    """The same for a README."""
    lines = [
        machine(settings),
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---" * 3 + "|---:" * (len(HEADINGS) - 3) + "|",
    ]
    for row in rows:
        cells = _cells(row)
        lines.append("| " + " | ".join([f"**{cells[0]}**" if is_ours(row) else cells[0], *cells[1:]]) + " |")
    lines += ["", *(f"* {line}" for line in ratios(rows)), *(f"* left out: {reason}" for reason in reasons)]
    return "\n".join(lines) + "\n"
