#!/usr/bin/env python
"""Say what a run came to: accuracy before and after, and where its files are.

python tools/report.py RUN_DIR [--summary FILE] [--set install_seconds=41 train_seconds=170]

Draws RUN_DIR/curves.png anew. --summary writes the figures as JSON, with whatever --set adds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gft_megatron.observe.report import write_curves


def summarize(run_dir: Path) -> dict[str, object]:
    """First and last evaluation and the paths in RUN_DIR/results.json.

    Raises:
        ValueError: the folder is no finished run.
    """
    try:
        results = json.loads((run_dir / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{run_dir} is no finished run: {error}") from None
    summary: dict[str, object] = {}
    evaluations = list(results["evaluations"].values())
    if evaluations:
        for when, figures in (("warmup", evaluations[0]), ("final", evaluations[-1])):
            for name, value in figures.items():
                kind, at, _ = name.removeprefix("eval/accuracy_").partition("@")
                if at:
                    summary[
                        f"{when}_accuracy" if kind == "avg" else f"{when}_{name.removeprefix('eval/accuracy_')}"
                    ] = value
    return {**summary, **{key: results[key] for key in ("run_dir", "hf_dir", "checkpoint_dir", "curves")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the figures here, as JSON")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="seconds measured by the caller")
    arguments = parser.parse_args()
    try:
        summary = summarize(arguments.run_dir)
        for assignment in arguments.set:
            name, _, value = assignment.partition("=")
            summary[name] = float(value)
    except ValueError as error:
        sys.exit(f"error: {error}")
    write_curves(arguments.run_dir / "metrics.jsonl", arguments.run_dir / "curves.png")
    if arguments.summary is not None:
        arguments.summary.write_text(json.dumps(summary, indent=1) + "\n")
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in summary.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
