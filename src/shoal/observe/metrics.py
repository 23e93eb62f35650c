"""Write and read `metrics.jsonl`: one JSON object a line, for each step that logged something."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shoal.observe.files import JSONValue, to_json


class MetricsWriter:
    """Appends to a metrics file; each line is on its way to the disk when `write` returns."""

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.time) -> None:
        """Open the file for appending, and make its folder.

        A line that an earlier run, killed while writing, left unfinished is ended first.

        Args:
            path: The file, usually `metrics.jsonl` in the run's folder.
            clock: Gives the time of a line, in seconds since 1970.

        Raises:
            OSError: The file cannot be opened for writing.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = _ends_in_mid_line(path)
        self._file = path.open("a", encoding="utf-8")
        self._clock = clock
        self._lock = threading.Lock()
        if torn:
            self._file.write("\n")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line: `step`, `time` and the metrics; NaN and infinities become null.

        Raises:
            OSError: The disk is full.
        """
        line = to_json({"step": step, "time": round(self._clock(), 3), **metrics})
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, JSONValue]]:
    """Read all lines in order, leaving out those that were never finished.

    A run that was resumed has some steps twice; `merge_by_step` keeps what counts.

    Raises:
        FileNotFoundError: There is no such file.
    """
    rows = []
    # Not splitlines(), which also cuts at U+2028 and the like; JSON strings may hold those.
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def merge_by_step(rows: list[dict[str, JSONValue]]) -> list[dict[str, JSONValue]]:
    """Join the rows of each step, the later value of a metric winning, in order of steps."""
    merged: dict[int, dict[str, JSONValue]] = {}
    for row in rows:
        step = row.get("step")
        if isinstance(step, int):
            merged.setdefault(step, {}).update(row)
    return [merged[step] for step in sorted(merged)]


def _ends_in_mid_line(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            if file.tell() == 0:
                return False
            file.seek(-1, 2)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False
