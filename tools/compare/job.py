"""A command of the comparison and the folder that it fills."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One command. Arguments may have {run} for the folder of the comparison, {python}, and {port} for a free port."""

    folder: str
    """Below the folder of the comparison. The command fills it, and nothing else does."""
    command: tuple[str, ...]
    result: str
    """File in `folder` that is there after success."""
    seconds: float
    """About how long it takes: for the order and the time to go."""
    needs: tuple[Job, ...] = ()
    """What has to be finished before."""

    @property
    def fingerprint(self) -> str:
        """Of the command and of all that it builds on."""
        content = [self.folder, self.command, self.result, [job.fingerprint for job in self.needs]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


_RECORD = "job.json"


def is_finished(job: Job, run_dir: Path) -> bool:
    """The folder holds the result of this very command, and of the same commands before it."""
    folder = run_dir / job.folder
    try:
        record = json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError):
        return False
    return (folder / job.result).exists() and record["fingerprint"] == job.fingerprint


def record_finished(job: Job, run_dir: Path, seconds: float) -> None:
    """From now on `is_finished`.

    Raises:
        ValueError: the result is missing.
    """
    folder = run_dir / job.folder
    if not (folder / job.result).exists():
        raise ValueError(f"{folder}: the command ended without an error and without {job.result}")
    record = {"fingerprint": job.fingerprint, "seconds": round(seconds, 1), "command": job.command}
    (folder / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
