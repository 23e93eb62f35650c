"""Account for a run's wall time, phase by phase."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)  # compared by identity: the same phase may be open twice
class _Entry:
    """One phase that is open now."""

    phase: str


@dataclass
class _Lane:
    """One thread's open phases, in the order in which they were opened, and up to when its time is accounted for."""

    accounted_until: float
    open: list[_Entry] = field(default_factory=list)


class TimeLedger:
    """Sums up seconds by phase, from any thread.

    Within one thread a moment counts once, for the phase opened last of those still open: a phase inside another takes
    its time away from the outer one. This holds also for the interleaved tasks of an event loop, which open and close
    phases in any order. Two threads that work at the same time both count, so the sum may exceed the wall time.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with nothing on the account.

        Args:
            clock: Gives seconds and never goes back.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._lanes: dict[int, _Lane] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Account for the time inside the `with` block, such as `"generate"` or `"start engines"`."""
        thread, entry = threading.get_ident(), _Entry(name)
        with self._lock:
            lane = self._lanes.setdefault(thread, _Lane(accounted_until=0.0))
            self._settle(lane)
            lane.open.append(entry)
        try:
            yield
        finally:
            with self._lock:
                self._settle(lane)
                lane.open.remove(entry)
                if not lane.open:
                    self._lanes.pop(thread, None)

    def add(self, name: str, seconds: float) -> None:
        """Account for time that was measured elsewhere."""
        with self._lock:
            self._seconds[name] += seconds

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase so far, open ones up to now, in the order in which they first occurred."""
        with self._lock:
            for lane in self._lanes.values():
                self._settle(lane)
            return dict(self._seconds)

    def _settle(self, lane: _Lane) -> None:
        """Give the time since the lane was last settled to its innermost open phase."""
        now = self._clock()
        if lane.open:
            self._seconds[lane.open[-1].phase] += now - lane.accounted_until
        lane.accounted_until = now
