"""One append-only file of records: what is in it, where, and which parts of it cannot be read. Nothing here writes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gft_megatron.groups import GroupKey
from gft_megatron.rollout.bank.records import MAGIC, Kind, Record, read_record

_NAME = re.compile(r"rank_(\d{5})\.ledger")
_CHUNK = 1 << 20


class Entry(NamedTuple):
    """A GROUP or DROPPED record, but for its samples."""

    offset: int
    size: int
    fingerprint: str
    row: int
    """-1 in a dropped group."""
    reason: str | None
    """Why it was dropped; None for a finished group."""
    written: int
    """By the clock of its rank's machine, in nanoseconds: which of two ranks' records of a key stands."""


class Marker(NamedTuple):
    session: str
    iteration: int
    keys: tuple[GroupKey, ...]


class Damage(NamedTuple):
    """Bytes that are no record."""

    path: Path
    offset: int
    size: int
    at_end: bool
    """Nothing readable comes after them: what a killed writer leaves."""

    def __str__(self) -> str:
        what = "torn tail" if self.at_end else "damaged"
        return f"{self.path.name}: {what}, {self.size} bytes at {self.offset}"


@dataclass
class Ledger:
    """The content of one file."""

    path: Path
    entries: dict[GroupKey, Entry] = field(default_factory=dict)
    """The last of each key: a later one stands for those before it."""
    markers: list[Marker] = field(default_factory=list)
    undone: dict[str, int] = field(default_factory=dict)
    """Session -> the last step of it that still counts."""
    damages: list[Damage] = field(default_factory=list)
    duplicates: int = 0
    end: int = 0
    """Behind the last readable record."""

    @property
    def rank(self) -> int:
        return int(self.path.name[5:10])


def ledger_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.ledger"


def ledger_paths(folder: Path) -> list[Path]:
    """By rank."""
    return sorted(path for path in folder.glob("rank_*.ledger") if _NAME.fullmatch(path.name))


def scan(path: Path) -> Ledger:
    """Read a file from its beginning to its end, a record at a time.

    Raises:
        ValueError: written in another format.
        OSError: the file cannot be read.
    """
    ledger = Ledger(path)
    with path.open("rb", buffering=0) as file:
        offset = 0
        size = os.fstat(file.fileno()).st_size
        while offset < size:
            record = read_record(file, offset)
            if record is None:
                after = _find_record(file, offset + 1)
                ledger.damages.append(Damage(path, offset, (after or size) - offset, at_end=after is None))
                offset = after or size
            else:
                _take_in(ledger, record, offset)
                offset += record.size
                ledger.end = offset
    return ledger


def read_group(path: Path, key: GroupKey, entry: Entry) -> Record | None:
    """The record of a group; None if it is not there any more: damaged, or moved by its owner."""
    try:
        with path.open("rb", buffering=0) as file:
            record = read_record(file, entry.offset)
    except FileNotFoundError:
        return None
    if record is None or record.kind is not Kind.GROUP or _key(record.head["key"]) != key:
        return None
    return record


def valid_markers(ledgers: Iterable[Ledger]) -> dict[GroupKey, int]:
    """Key -> the step that it was trained in, but for what was undone since."""
    ledgers = list(ledgers)
    undone = undone_after(ledgers)
    found: dict[GroupKey, int] = {}
    for marker in (marker for ledger in ledgers for marker in ledger.markers):
        if counts(marker, undone):
            for key in marker.keys:
                found[key] = min(marker.iteration, found.get(key, marker.iteration))
    return found


def undone_after(ledgers: Iterable[Ledger]) -> dict[str, int]:
    """Session -> the last step of it that still counts, whoever wrote it down."""
    found: dict[str, int] = {}
    for ledger in ledgers:
        for session, iteration in ledger.undone.items():
            found[session] = min(iteration, found.get(session, iteration))
    return found


def counts(marker: Marker, undone: dict[str, int]) -> bool:
    return marker.iteration <= undone.get(marker.session, marker.iteration)


def _take_in(ledger: Ledger, record: Record, offset: int) -> None:
    head = record.head
    if record.kind in (Kind.GROUP, Kind.DROPPED):
        key = _key(head["key"])
        # The file's fingerprints are few, its groups many.
        entry = Entry(
            offset,
            record.size,
            sys.intern(head["fingerprint"]),
            head.get("row", -1),
            head.get("reason"),
            head["written"],
        )
        ledger.duplicates += key in ledger.entries
        ledger.entries[key] = entry
    elif record.kind is Kind.CONSUMED:
        keys = tuple(_key(pair) for pair in head["keys"])
        ledger.markers.append(Marker(sys.intern(head["session"]), head["iteration"], keys))
    else:
        for session, iteration in head["after"].items():
            ledger.undone[session] = min(iteration, ledger.undone.get(session, iteration))


def _find_record(file: BinaryIO, start: int) -> int | None:
    """Where the next readable record begins."""
    while chunk := os.pread(file.fileno(), _CHUNK, start):
        at = chunk.find(MAGIC)
        while at >= 0:
            if read_record(file, start + at):
                return start + at
            at = chunk.find(MAGIC, at + 1)
        # A magic may lie across the border.
        start += max(len(chunk) - len(MAGIC) + 1, 1)
    return None


def _key(pair: list[int]) -> GroupKey:
    return GroupKey(*pair)
