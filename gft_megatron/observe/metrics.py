"""metrics.jsonl, the record that every curve is drawn from, and the stop-watch that fills in where the time went.

One line a record: {"step": 12, "wall": 3.127, "train/loss": 0.1234, ...}; `wall` is seconds since the run began, added
up over restarts. A step may have a second line with its evaluation. Every line is strict JSON, which knows no NaN: a
non-finite figure is null, and named under "non_finite" as "nan", "inf" or "-inf".
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

Record = dict[str, float]

_NOT_FIGURES = frozenset({"step", "wall", "non_finite"})


class MetricsLog:
    """Appends to metrics.jsonl. Each line reaches the file whole, before `log` returns."""

    def __init__(self, path: Path | str, *, resume_step: int = 0) -> None:
        """
        Args:
            resume_step: the step of the checkpoint that training goes on from. Lines after it describe steps that will
                be done again, and are cut off. 0: the run starts from the beginning, and no line is kept.

        Raises:
            ValueError: the file to go on with is not one of ours.
        """
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(self._path) if record["step"] <= resume_step] if resume_step else []
        self._replace(kept)
        self._file = self._path.open("a", buffering=1, encoding="utf-8")
        self._start = time.monotonic() - (kept[-1]["wall"] if kept else 0.0)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one line."""
        assert not _NOT_FIGURES & figures.keys(), f"not names of figures: {_NOT_FIGURES & figures.keys()}"
        self._file.write(_to_line({"step": step, "wall": round(time.monotonic() - self._start, 3), **figures}))

    def close(self) -> None:
        self._file.close()

    def _replace(self, records: list[Record]) -> None:
        # A kill in the middle leaves the old file or the new one, never half of one.
        temporary = self._path.with_name(self._path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(map(_to_line, records))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)


def read_metrics(path: Path | str) -> list[Record]:
    """The records of a metrics.jsonl in their order, non-finite figures restored; none if there is no file.

    A last line that is torn, because the writer was killed or is writing now, is left out.

    Raises:
        ValueError: some other line cannot be read.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_from_line(line))
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with a step, got {line[:60]!r}; "
                f"delete the line, or move the file away to start a new one"
            ) from None
    return records


def _to_line(record: Mapping[str, float]) -> str:
    finite = {name: value if name == "step" else float(value) for name, value in record.items()}
    non_finite = {name: str(value) for name, value in finite.items() if not math.isfinite(value)}
    content: dict[str, object] = {**finite, **dict.fromkeys(non_finite)}
    if non_finite:
        content["non_finite"] = non_finite
    return json.dumps(content, allow_nan=False) + "\n"


def _from_line(line: str) -> Record:
    content = json.loads(line)
    if not isinstance(content, dict):
        raise TypeError(type(content))
    non_finite = content.pop("non_finite", {})
    record = {name: float(non_finite[name] if value is None else value) for name, value in content.items()}
    return {**record, "step": int(record["step"]), "wall": record["wall"]}


class Timings:
    """Seconds spent under each name since the last `pop`, on this process's clock.

    Work on a GPU counts where the host waits for it.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last_pop = time.perf_counter()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`, also when it raises. Blocks may lie inside each other."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def pop(self) -> dict[str, float]:
        """{"time/NAME_sec": seconds, ...} and "time/step_sec", everything since the last `pop`; start anew."""
        now = time.perf_counter()
        figures = {f"time/{name}_sec": seconds for name, seconds in self._seconds.items()}
        figures["time/step_sec"] = now - self._last_pop
        self._seconds, self._last_pop = {}, now
        return figures


class Rates:
    """Counts that only grow, as counts a second."""

    def __init__(self, *, over_sec: float = 0.0) -> None:
        """
        Args:
            over_sec: the shortest time to take a mean over; asked sooner, the last rates are told again.
        """
        self._over_sec = over_sec
        self._since = time.monotonic()
        self._before: dict[str, float] = {}
        self._rates: dict[str, float] = {}

    def of(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Since the call before."""
        now = time.monotonic()
        seconds = now - self._since
        if seconds >= max(self._over_sec, 1e-9):
            self._rates = {name: (count - self._before.get(name, 0.0)) / seconds for name, count in counts.items()}
            self._since, self._before = now, dict(counts)
        return self._rates
