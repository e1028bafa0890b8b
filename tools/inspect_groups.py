#!/usr/bin/env python
"""Look at the groups that a run has recorded: who wrote the responses, what they earned, and what became of them.

python tools/inspect_groups.py RUN_DIR                          # a line for each group, and a sum
python tools/inspect_groups.py RUN_DIR --rollout 12 --state finished
python tools/inspect_groups.py RUN_DIR --show 12/3              # the responses of group 3 of rollout 12

A group is finished (not trained on yet), consumed (trained on in that step) or dropped. Reads RUN_DIR/bank and changes
nothing, so it may look at a run that is going on. On a terminal there is a table; elsewhere lines with tabs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from gft_megatron.groups import GroupKey, Sample
from gft_megatron.observe.wording import inert
from gft_megatron.rollout.bank.ledger import Entry, Ledger, ledger_paths, read_group, scan, valid_markers
from gft_megatron.rollout.bank.records import samples_of

STATES = ("finished", "consumed", "dropped")
COLUMNS = ("group", "row", "sources", "rewards", "lengths", "truncated", "weights", "state")


@dataclass(frozen=True)
class Recorded:
    """A group as the ledgers have it."""

    key: GroupKey
    path: Path
    entry: Entry
    iteration: int | None
    """The step that trained on it."""

    @property
    def state(self) -> str:
        if self.entry.reason is not None:
            return "dropped"
        return "finished" if self.iteration is None else "consumed"

    def samples(self) -> tuple[Sample, ...] | None:
        """None where the file has changed since it was read, or is damaged."""
        record = read_group(self.path, self.key, self.entry)
        return None if record is None else samples_of(record)


def read_bank(folder: Path) -> tuple[list[Recorded], list[str]]:
    """All groups by key, and what could not be read.

    Raises:
        ValueError: there is no bank.
    """
    paths = ledger_paths(folder)
    if not paths:
        raise ValueError(f"{folder} holds no ledger: expected a run folder with recorded groups in its bank/")
    ledgers: list[Ledger] = []
    troubles: list[str] = []
    for path in paths:
        try:
            ledgers.append(scan(path))
        except (OSError, ValueError) as error:
            troubles.append(f"{path.name}: {error}")
    troubles += [str(damage) for ledger in ledgers for damage in ledger.damages]
    consumed = valid_markers(ledgers)
    found: dict[GroupKey, Recorded] = {}
    for ledger in ledgers:
        for key, entry in ledger.entries.items():
            if key not in found or found[key].entry.written < entry.written:
                found[key] = Recorded(key, ledger.path, entry, consumed.get(key))
    return [found[key] for key in sorted(found)], troubles


def row_of(group: Recorded) -> list[str]:
    """The cells of COLUMNS."""
    state = group.state
    if group.iteration is not None:
        state += f" at step {group.iteration}"
    if group.entry.reason is not None:
        state += f": {inert(group.entry.reason)}"
    name = f"{group.key.rollout_id}/{group.key.group_id}"
    samples = () if group.entry.reason is not None else group.samples()
    if samples is None:
        return [name, str(group.entry.row), *["?"] * 5, f"{state}, cannot be read"]
    if not samples:
        return [name, *["-"] * 6, state]
    sources = Counter(sample.source.name.lower() for sample in samples)
    return [
        name,
        str(group.entry.row),
        " ".join(f"{number} {source}" for source, number in sources.items()),
        " ".join(_number(sample.reward) for sample in samples),
        " ".join(str(len(sample.token_ids)) for sample in samples),
        str(sum(sample.truncated for sample in samples)),
        _versions(samples),
        state,
    ]


def told(group: Recorded, samples: tuple[Sample, ...]) -> Iterator[str]:
    """The responses of a group, line by line."""
    yield "  ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, row_of(group), strict=True))
    for sample in samples:
        spans = ", ".join(f"version {span.version} [{span.start}, {span.end})" for span in sample.weight_spans)
        log_probs = sample.rollout_log_probs
        words = [
            sample.source.name.lower(),
            f"reward {_number(sample.reward)}",
            f"{len(sample.token_ids)} tokens",
            "truncated" if sample.truncated else "",
            f"response {sample.response} of the row" if sample.response >= 0 else "",
            spans,
            f"mean log-prob {np.nanmean(log_probs):.3f}" if log_probs is not None and len(log_probs) else "",
        ]
        yield ""
        yield "  ".join(filter(None, words))
        yield from (f"    {inert(line)}" for line in sample.text.split("\n"))


def parse_key(text: str) -> GroupKey:
    rollout, slash, group = text.partition("/")
    if not (slash and rollout.isdecimal() and group.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected ROLLOUT/GROUP as in the first column, such as 12/3, got {text!r}")
    return GroupKey(int(rollout), int(group))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--rollout", type=int, metavar="N", help="only groups of this rollout")
    parser.add_argument("--row", type=int, metavar="N", help="only groups of this row of the data")
    parser.add_argument("--state", choices=STATES, help="only groups in this state")
    parser.add_argument("--show", type=parse_key, metavar="KEY", help="the responses of one group, such as 12/3")
    arguments = parser.parse_args()
    folder = arguments.run_dir / "bank"
    try:
        groups, troubles = read_bank(folder)
        if arguments.show is not None:
            _show(groups, arguments.show)
        else:
            chosen = [
                group
                for group in groups
                if arguments.rollout in (None, group.key.rollout_id)
                and arguments.row in (None, group.entry.row)
                and arguments.state in (None, group.state)
            ]
            _print_rows(chosen)
            print(_sum(chosen, folder))
        for trouble in troubles:
            print(f"warning: {inert(trouble)}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more


def _show(groups: list[Recorded], key: GroupKey) -> None:
    group = next((group for group in groups if group.key == key), None)
    samples = () if group is None or group.entry.reason is not None else group.samples()
    if group is None or samples is None:
        raise ValueError(f"there is no readable group {key.rollout_id}/{key.group_id}; without --show all are listed")
    for line in told(group, samples):
        print(line)


def _print_rows(groups: list[Recorded]) -> None:
    # Without markup, "[bold]" in a reason is only that text.
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        for cells in (COLUMNS, *map(row_of, groups)):
            print(*cells, sep="\t")
        return
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in ("row", "truncated") else "left")
    for group in groups:
        table.add_row(*row_of(group))
    console.print(table)


def _sum(groups: list[Recorded], folder: Path) -> str:
    states = Counter(group.state for group in groups)
    fingerprints = {group.entry.fingerprint for group in groups}
    size = sum(path.stat().st_size for path in ledger_paths(folder))
    words = [
        f"{len(groups)} groups: " + ", ".join(f"{states[state]} {state}" for state in STATES),
        f"{len(ledger_paths(folder))} ledgers, {size:,} bytes, {sum(group.entry.size for group in groups):,} of these",
    ]
    if len(fingerprints) > 1:
        words.append(f"made with {len(fingerprints)} different settings")
    return "; ".join(words)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _versions(samples: tuple[Sample, ...]) -> str:
    versions = [span.version for sample in samples for span in sample.weight_spans]
    if not versions:
        return "-"
    low, high = min(versions), max(versions)
    return str(low) if low == high else f"{low}-{high}"


if __name__ == "__main__":
    main()
