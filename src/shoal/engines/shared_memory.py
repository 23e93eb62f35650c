"""Shared memory that outlives its processes: what a tree of them has mapped in /dev/shm, and its removal.

vLLM's processes hand one another batches through it and remove it when they end in order. After `kill -9` nobody does,
and it is memory of this machine until the next start. Linux only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

_PLACE = Path("/dev/shm")


class SharedMemory:
    """Remembers the files that processes have mapped, so that they can be removed when no process is left to ask."""

    def __init__(self) -> None:
        self._mapped: set[Path] = set()
        self._seen: set[Path] = set()
        self._known: set[Path] = set()

    def look(self, pids: Callable[[], Iterable[int]]) -> None:
        """Remember what these processes have mapped. Cheap while no file is new.

        Args:
            pids: Lists the processes.
        """
        there = set(_PLACE.iterdir()) if _PLACE.is_dir() else set()
        if there - self._known:
            self._mapped |= _mapped_by(pids())
            # What is as new as this look may not have been mapped yet: the next one reads the maps again.
            self._known = self._seen & there
        self._seen = there

    def remove(self) -> None:
        """Remove what was remembered, is still there, and is mapped by nobody any more."""
        left = {file for file in self._mapped if file.exists()}
        if left:
            everybody = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
            for file in left - _mapped_by(everybody):
                file.unlink(missing_ok=True)


def _mapped_by(pids: Iterable[int]) -> set[Path]:
    """Return the files of /dev/shm that processes have mapped; those of others' processes cannot be read."""
    files = set()
    for pid in pids:
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue
        for line in maps.splitlines():
            if f" {_PLACE}/" in line and not line.endswith(" (deleted)"):
                files.add(_PLACE / line.partition(f"{_PLACE}/")[2])
    return files
