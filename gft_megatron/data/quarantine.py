"""Where bad rows go, and when there are too many of them to go on."""

from __future__ import annotations

import json
from pathlib import Path

from gft_megatron.data.rows import BadRow


class Quarantine:
    """A context that writes one JSON line {file, line, reason} for each bad row. The file is there even if empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0
        self._first = ""

    def __enter__(self) -> Quarantine:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, file: Path, line: int, bad: BadRow) -> None:
        """Set a row aside."""
        self.num_rows += 1
        self._first = self._first or f"{file} line {line}: {bad}"
        self._file.write(json.dumps({"file": str(file), "line": line, "reason": str(bad)}) + "\n")

    def require_few(self, num_good: int, max_bad_row_frac: float) -> None:
        """Raise ValueError if no row is good or the share of bad ones is above the limit."""
        if not self.num_rows:
            return
        total = self.num_rows + num_good
        if num_good and self.num_rows <= max_bad_row_frac * total:
            return
        remedy = f"raise --max-bad-row-frac {max_bad_row_frac:g}" if num_good else "no good row is left"
        raise ValueError(
            f"{self.num_rows} of {total} data rows are bad ({self.num_rows / total:.2%}); the first is {self._first}; "
            f"all are named in {self.path}: repair them, or {remedy}"
        )
