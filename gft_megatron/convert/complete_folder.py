"""A folder that is either absent or complete, whenever the process dies.

Everything goes into a sibling folder `.NAME.partial`, is flushed to disk, and renamed to NAME at the end. One writer a
folder at a time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from gft_megatron.convert.weight_files import read_json
from gft_megatron.durable import sync

_MARKER_FILE = "gft_megatron_export.json"
"""Lists the files that we wrote: a folder is replaced only while it holds nothing else."""


class CompleteFolder:
    """The folder while it is written. Without `publish`, leaving the `with` block leaves nothing behind."""

    def __init__(self, target: Path, *, flag: str) -> None:
        """Start it.

        Args:
            target: absent, empty, or a folder that this class wrote and nobody added to; that one will be replaced.
            flag: what the user gave it by, for the message.

        Raises:
            ValueError: `target` holds something else.
            OSError: the disk failed or is full.
        """
        self.target = target.resolve()
        refuse_to_replace_what_is_not_ours(self.target, flag=flag)
        self.partial = self.target.with_name(f".{self.target.name}.partial")
        """Where the files go until then."""
        with naming_the_disk(self.target):
            shutil.rmtree(self.partial, ignore_errors=True)  # left by a process that was killed
            self.partial.mkdir(parents=True)

    def __enter__(self) -> CompleteFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def discard(self) -> None:
        """Remove what is not published."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def publish(self, facts: dict[str, Any] | None = None) -> None:
        """Flush and rename. A kill between the two renames leaves no folder, never half of one.

        Args:
            facts: written beside the list of files, for people.

        Raises:
            OSError: the disk failed or is full; the message names the path and the free bytes.
        """
        with naming_the_disk(self.target):
            names = sorted(path.relative_to(self.partial).as_posix() for path in _files_below(self.partial))
            write_json(self.partial / _MARKER_FILE, {"files": [*names, _MARKER_FILE], **(facts or {})})
            for path in [*self.partial.rglob("*"), self.partial]:
                sync(path)
            previous = self.target.with_name(f".{self.target.name}.previous")
            shutil.rmtree(previous, ignore_errors=True)
            if self.target.exists():
                os.rename(self.target, previous)
            os.rename(self.partial, self.target)
            sync(self.target.parent)
            shutil.rmtree(previous, ignore_errors=True)


def refuse_to_replace_what_is_not_ours(target: Path, *, flag: str) -> None:
    """Raises ValueError if the folder holds what no `CompleteFolder` wrote."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{flag} {target} is a file, expected a folder or nothing")
    found = {entry.name for entry in target.iterdir()}
    written = set(read_json(target / _MARKER_FILE).get("files", ())) if _MARKER_FILE in found else set()
    foreign = found - {name.split("/")[0] for name in written}
    if not foreign:
        foreign = {path.relative_to(target).as_posix() for path in _files_below(target)} - written
    if foreign:
        raise ValueError(
            f"{flag} {target} holds {min(foreign)!r}, which no earlier export wrote; choose another folder or empty it"
        )


@contextmanager
def naming_the_disk(path: Path) -> Iterator[None]:
    """Turn what goes wrong in writing into an OSError with the path and the free bytes there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        folder = next(parent for parent in path.parents if parent.exists())
        raise OSError(f"cannot write {path}: {error}; {shutil.disk_usage(folder).free} bytes are free there") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """For people to read: indented, with a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def _files_below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir())
