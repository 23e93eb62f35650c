"""When an engine is given up: it says nothing, or writes nothing, for too long. Pure; the time is passed in."""

from __future__ import annotations

from shoal.types import EngineReport

_MOST_INCIDENTS = 3


class EngineWatch:
    """What was seen of one engine since the watch began.

    Args:
        stall_s: How long it may say nothing, or write nothing while it has something to write.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._silent_since: float | None = None
        self._num_tokens: int | None = None
        self._moved_at: float | None = None
        self._num_incidents = 0

    def answered(self, report: EngineReport, *, in_flight: int, now: float) -> str | None:
        """Take up a report; return why the engine is given up, or None.

        Args:
            report: What it says.
            in_flight: Samples that it was given and that have not ended.
            now: Seconds, of a clock that never goes back.
        """
        self._silent_since = None
        if in_flight == 0 or report.num_tokens is None or report.num_tokens != self._num_tokens:
            self._num_tokens = report.num_tokens
            self._moved_at = now
            return None
        if self._moved_at is None or now - self._moved_at < self._stall_s:
            return None
        return f"it has {in_flight} samples to write and wrote nothing for {now - self._moved_at:.0f} s"

    def silent(self, error: str, *, since: float, now: float) -> str | None:
        """Take note that it did not answer; return why the engine is given up, or None.

        Args:
            error: What happened instead.
            since: When it was asked.
            now: Seconds, of a clock that never goes back.
        """
        if self._silent_since is None:
            self._silent_since = since
        if now - self._silent_since < self._stall_s:
            return None
        return f"it did not answer for {now - self._silent_since:.0f} s: {error}"

    def wrote(self) -> None:
        """Take note that it has written a sample."""
        self._num_incidents = 0

    def failed(self, error: str) -> str | None:
        """Take note that it failed samples after having been trusted; return why the engine is given up, or None.

        Samples that fail together are one incident.
        """
        self._num_incidents += 1
        if self._num_incidents < _MOST_INCIDENTS:
            return None
        return f"it failed {self._num_incidents} times in a row and wrote nothing in between; the last time: {error}"
