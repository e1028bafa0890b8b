"""Finished groups, durably: appended when they are made, marked when they are trained on, found again after a kill.

Each collecting rank appends to a ledger of its own, FOLDER/rank_00000.ledger, and reads those of all ranks when it
opens: their number may have changed. With a checkpoint of step T, a group

    trained on in a step m <= T   is in the checkpoint: discarded
    trained on in a step m >  T   is not: restored, and what was marked is undone
    never trained on              restored
    dropped                       stays dropped, by the same rule

In which order ledgers were written does not matter, hence neither does which rank opens first. Marks carry the session
(one `Bank`) that made them, and undoing names sessions.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gft_megatron.durable import sync
from gft_megatron.groups import Group, GroupKey, Sample
from gft_megatron.rollout.bank.ledger import (
    Damage,
    Entry,
    Ledger,
    Marker,
    counts,
    ledger_path,
    ledger_paths,
    read_group,
    scan,
    undone_after,
    valid_markers,
)
from gft_megatron.rollout.bank.records import (
    consumed_record,
    dropped_record,
    group_record,
    samples_of,
    undone_record,
)

_COPIED_AT_ONCE = 1 << 20  # bytes
_logger = logging.getLogger(__name__)


class StoredGroup(NamedTuple):
    """Where a finished group lies."""

    path: Path
    entry: Entry


@dataclass(frozen=True)
class RecoveryReport:
    """What was found when a bank was opened, in the ledgers of all ranks. As text: one line."""

    restored: int
    """Groups that wait for their training, `undone` among them."""
    undone: int
    """Groups whose training came after the checkpoint."""
    discarded: int
    """Groups, dropped ones too, that the checkpoint has behind it."""
    dropped: int
    """Groups that came to nothing, after the checkpoint."""
    other_settings: int
    """Groups made with another fingerprint: not used."""
    duplicates: int
    """Records of a key that has another one."""
    damages: tuple[Damage, ...]

    def __str__(self) -> str:
        words = [f"{self.restored} groups restored"]
        told = {
            "of them trained on after the checkpoint": self.undone,
            "discarded, trained on before the checkpoint": self.discarded,
            "dropped": self.dropped,
            "made with other settings, not used": self.other_settings,
            "recorded twice": self.duplicates,
        }
        words += [f"{number} {what}" for what, number in told.items() if number]
        words += [str(damage) for damage in self.damages]
        return "; ".join(words)


class Bank:
    """The ledger of one collecting rank, and what all ranks' ledgers held when it was opened. Thread-safe.

    Attributes:
        report: RecoveryReport.
        restored: dict[GroupKey, StoredGroup], the groups of earlier sessions that are still to be taken.
        dropped: dict[GroupKey, str], those of earlier sessions that came to nothing, and why. Of both only keys that
            this session has not recorded or marked itself.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Not for callers: see `open`."""
        self.restored: dict[GroupKey, StoredGroup] = {}
        self.dropped: dict[GroupKey, str] = {}
        self._path = path
        self._fingerprint = fingerprint
        self._session = uuid.uuid4().hex[:16]
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._end = 0
        self._own: dict[GroupKey, Entry] = {}
        self._markers: list[Marker] = []
        """Those in this file that count."""
        self._consumed: dict[GroupKey, int] = {}
        self._elsewhere: frozenset[GroupKey] = frozenset()
        """Keys that other files have a record of: their marks have to stay, however old."""
        self._undone: dict[str, int] = {}
        """What has to stay of this file's UNDONE records: marks that they undo are in other files."""
        self._abandoned: dict[Path, tuple[GroupKey, ...]] = {}
        """Files to remove once all of their groups are behind every checkpoint."""

    @classmethod
    def open(
        cls, folder: str | Path, *, rank: int, num_ranks: int, fingerprint: str, checkpoint_iteration: int
    ) -> Bank:
        """Recover what the ledgers of a folder hold, and go on with the one of this rank.

        A kill at any moment of it leaves what it found. All ranks open before one of them appends or marks.

        Args:
            rank: of the collecting ranks, 0 .. num_ranks - 1. Files of ranks beyond are read, and removed when no
                checkpoint can ask for their groups any more.
            fingerprint: of what decides a group's content; groups made with another one are not restored.
            checkpoint_iteration: the step that training goes on from; 0 from the beginning.

        Raises:
            ValueError: a ledger of another format.
            OSError: no room, or a file that cannot be read.
        """
        assert 0 <= rank < num_ranks, (rank, num_ranks)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = ledger_path(folder, rank)
        _partial(path).unlink(missing_ok=True)  # of a compaction that was cut off
        bank = cls(path, fingerprint)
        sync(folder.parent)
        sync(folder)
        bank._recover(_scan_all(folder), num_ranks, checkpoint_iteration)
        return bank

    def take(self, key: GroupKey) -> tuple[int, tuple[Sample, ...]] | None:
        """The prompt row and the samples of a restored group, which is then the caller's; None: it is to be made."""
        with self._lock:
            stored = self.restored.pop(key, None)
            if stored is None:
                return None
            record = read_group(stored.path, key, stored.entry)
            if record is None and stored.path != self._path and stored.path.exists():
                # Its owner has compacted the file since.
                entry = scan(stored.path).entries.get(key)
                record = None if entry is None else read_group(stored.path, key, entry)
        if record is None:
            _logger.warning("%s of %s cannot be read any more: the group is made again", key, stored.path)
            return None
        return record.head["row"], samples_of(record)

    def append(self, items: Sequence[tuple[GroupKey, Group]]) -> None:
        """Record finished groups: they are on the disk when this returns, or none of them after an OSError."""
        told = [
            (key, group.prompt.row, None, group_record(key, self._fingerprint, group.prompt.row, group.samples))
            for key, group in items
        ]
        self._record(told)

    def mark_dropped(self, reasons: Mapping[GroupKey, str]) -> None:
        """Record that these groups came to nothing: a resumed run finds them in `dropped`."""
        told = [(key, -1, reason, dropped_record(key, self._fingerprint, reason)) for key, reason in reasons.items()]
        self._record(told)

    def mark_consumed(self, keys: Iterable[GroupKey], iteration: int) -> None:
        """Record that this optimizer step is the last one that needs these keys, dropped ones among them.

        Before the checkpoint of the step is written: the other way round, a kill in between trains twice.
        """
        marker = Marker(self._session, iteration, tuple(keys))
        if not marker.keys:
            return
        with self._lock:
            self._write(consumed_record(*marker))
            self._markers.append(marker)
            for key in marker.keys:
                self._consumed[key] = min(iteration, self._consumed.get(key, iteration))
                self._forget_earlier(key)

    def compact(self, oldest_checkpoint: int) -> None:
        """Forget what no checkpoint from this one on asks for; the file is rewritten when half of it can go.

        A kill leaves the old file or the new one.

        Raises:
            OSError: no room for the new file; the old one is as it was.
        """
        with self._lock:
            self._remove_abandoned(oldest_checkpoint)
            live = {
                key: entry
                for key, entry in self._own.items()
                if entry.fingerprint == self._fingerprint and self._is_after(key, oldest_checkpoint)
            }
            if 2 * sum(entry.size for entry in live.values()) <= self._end and self._end:
                self._rewrite(live)

    def close(self) -> None:
        """The last call; it may come twice."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _recover(self, ledgers: list[Ledger], num_ranks: int, checkpoint_iteration: int) -> None:
        own = next(ledger for ledger in ledgers if ledger.path == self._path)
        others = [ledger for ledger in ledgers if ledger is not own]
        before = valid_markers(ledgers)
        after_checkpoint = {
            marker.session: checkpoint_iteration
            for ledger in ledgers
            for marker in ledger.markers
            if marker.iteration > checkpoint_iteration and counts(marker, undone_after(ledgers))
        }
        if any(damage.at_end for damage in own.damages):
            os.ftruncate(self._file, own.end)
        self._end = own.end
        if after_checkpoint:
            self._write(undone_record(after_checkpoint))
            own.undone |= after_checkpoint
        undone = undone_after(ledgers)
        self._consumed = valid_markers(ledgers)
        self._own = own.entries
        self._markers = [marker for marker in own.markers if counts(marker, undone)]
        self._elsewhere = frozenset(key for ledger in others for key in ledger.entries)
        self._undone = _needed_by(own, others)
        self._abandoned = {
            ledger.path: tuple(key for key, entry in ledger.entries.items() if entry.fingerprint == self._fingerprint)
            for ledger in others
            if ledger.rank >= num_ranks and ledger.rank % num_ranks == own.rank and not _is_needed(ledger, ledgers)
        }
        self._sort(ledgers, before)

    def _sort(self, ledgers: list[Ledger], before: dict[GroupKey, int]) -> None:
        """What is restored, what is discarded, and the report."""
        found: dict[GroupKey, StoredGroup] = {}
        duplicates = sum(ledger.duplicates for ledger in ledgers)
        for ledger in ledgers:
            for key, entry in ledger.entries.items():
                if entry.fingerprint == self._fingerprint:
                    duplicates += key in found
                    if key not in found or found[key].entry.written < entry.written:
                        found[key] = StoredGroup(ledger.path, entry)
        waiting = {key: stored for key, stored in found.items() if key not in self._consumed}
        self.restored = {key: stored for key, stored in waiting.items() if stored.entry.reason is None}
        self.dropped = {key: stored.entry.reason for key, stored in waiting.items() if stored.entry.reason is not None}
        self.report = RecoveryReport(
            restored=len(self.restored),
            undone=sum(key in before for key in self.restored),
            discarded=len(found) - len(waiting),
            dropped=len(self.dropped),
            other_settings=sum(
                entry.fingerprint != self._fingerprint for ledger in ledgers for entry in ledger.entries.values()
            ),
            duplicates=duplicates,
            damages=tuple(damage for ledger in ledgers for damage in ledger.damages),
        )

    def _record(self, told: list[tuple[GroupKey, int, str | None, bytes]]) -> None:
        if not told:
            return
        with self._lock:
            offset = self._write(b"".join(record for *_, record in told))
            for key, row, reason, record in told:
                self._own[key] = Entry(offset, len(record), self._fingerprint, row, reason, time.time_ns())
                self._forget_earlier(key)
                offset += len(record)

    def _forget_earlier(self, key: GroupKey) -> None:
        self.restored.pop(key, None)
        self.dropped.pop(key, None)

    def _write(self, data: bytes) -> int:
        """Append durably, or not at all. Returns where."""
        start, written = self._end, 0
        try:
            while written < len(data):
                written += os.pwrite(self._file, memoryview(data)[written:], start + written)
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):  # the next record is written over what is left
                os.ftruncate(self._file, start)
            raise self._no_room(error, len(data)) from error
        self._end = start + written
        return start

    def _rewrite(self, live: dict[GroupKey, Entry]) -> None:
        partial = _partial(self._path)
        markers = [
            Marker(session, iteration, kept)
            for session, iteration, keys in self._markers
            if (kept := tuple(key for key in keys if key in live or key in self._elsewhere))
        ]
        notes = b"".join(consumed_record(*marker) for marker in markers)
        if self._undone:
            notes += undone_record(self._undone)
        moved: dict[GroupKey, Entry] = {}
        try:
            with partial.open("w+b") as file:
                for key, entry in sorted(live.items(), key=lambda item: item[1].offset):
                    moved[key] = entry._replace(offset=file.tell())
                    for part in self._parts(entry):
                        file.write(part)
                file.write(notes)
                file.flush()
                os.fsync(file.fileno())
                end = file.tell()
                os.replace(partial, self._path)
                os.dup2(file.fileno(), self._file, inheritable=False)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise self._no_room(error, sum(entry.size for entry in live.values())) from error
        self._end, self._own, self._markers = end, moved, markers
        asked_for = moved.keys() | {key for keys in self._abandoned.values() for key in keys}
        self._consumed = {key: step for key, step in self._consumed.items() if key in asked_for}
        for key, stored in self.restored.items():
            if stored.path == self._path:
                self.restored[key] = StoredGroup(self._path, moved[key])
        sync(self._path.parent)

    def _parts(self, entry: Entry) -> Iterator[bytes]:
        for offset in range(entry.offset, entry.offset + entry.size, _COPIED_AT_ONCE):
            yield os.pread(self._file, min(_COPIED_AT_ONCE, entry.offset + entry.size - offset), offset)

    def _remove_abandoned(self, oldest_checkpoint: int) -> None:
        for path, keys in list(self._abandoned.items()):
            if not any(self._is_after(key, oldest_checkpoint) for key in keys):
                path.unlink(missing_ok=True)
                del self._abandoned[path]

    def _is_after(self, key: GroupKey, checkpoint: int) -> bool:
        """A run that goes on from this checkpoint may ask for it."""
        return key not in self._consumed or self._consumed[key] > checkpoint

    def _no_room(self, error: OSError, size: int) -> OSError:
        free = shutil.disk_usage(self._path.parent).free
        return OSError(
            error.errno,
            f"could not write {size} bytes to {self._path}: {error.strerror}; {free} bytes are free there; what was "
            f"recorded before is whole: make room and start again",
        )


def _scan_all(folder: Path) -> list[Ledger]:
    ledgers = []
    for path in ledger_paths(folder):
        with contextlib.suppress(FileNotFoundError):  # an abandoned one, removed by another rank just now
            ledgers.append(scan(path))
    return ledgers


def _needed_by(ledger: Ledger, others: Iterable[Ledger]) -> dict[str, int]:
    """What a ledger undoes of others' marks."""
    marked = {(marker.session, marker.iteration) for other in others for marker in other.markers}
    return {
        session: iteration
        for session, iteration in ledger.undone.items()
        if any(session == other and iteration < step for other, step in marked)
    }


def _is_needed(ledger: Ledger, ledgers: list[Ledger]) -> bool:
    """It marks, or undoes, what other files hold."""
    others = [other for other in ledgers if other is not ledger]
    marked = {key for marker in ledger.markers for key in marker.keys}
    return bool(_needed_by(ledger, others)) or any(key in other.entries for other in others for key in marked)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
