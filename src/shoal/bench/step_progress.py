"""Taking what a trainer writes down into the results while it runs, so that nothing is lost however it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from shoal.bench.results import store
from shoal.bench.step_report import StepReport, Trainer, measured_from, run_of


class StepProgress:
    """What one trainer has done so far, in the reports of its parts.

    Args:
        trainer: Whose figures these are.
        reports: Of the parts, in the order in which they are measured.
        answer: What the trainer writes after every step.
        peak: Returns the most memory that was used so far, in bytes.
    """

    def __init__(self, trainer: Trainer, reports: Sequence[StepReport], answer: Path, peak: Callable[[], int]) -> None:
        self._trainer = trainer
        self._reports = reports
        self._answer = answer
        self._peak = peak
        self._run = run_of(reports)
        self._seen_ns = 0

    def look(self) -> None:
        """Store what there is if a step was done since the last look.

        Raises:
            OSError: It cannot be stored.
        """
        written_ns = self._answer.stat().st_mtime_ns if self._answer.exists() else 0
        if written_ns != self._seen_ns:
            self._seen_ns = written_ns
            self._take("it was still running")

    def end(self, failure: str | None) -> None:
        """Store what there is at last.

        Args:
            failure: Why the trainer did not end as it should; None if it did.

        Raises:
            OSError: It cannot be stored.
        """
        self._take(failure or "it ended early")
        last = self._reports[-1]
        if failure is not None and last.is_complete(self._trainer):
            last.reasons[self._trainer] = f"all steps were measured, but then: {failure}"
            store(last.path, last.to_dict())

    def _take(self, reason: str) -> None:
        # A part that is complete is left as it is: memory used in the next one is not its own.
        data = json.loads(self._answer.read_text()) if self._answer.exists() else None
        for index, report in enumerate(self._reports):
            if report.is_complete(self._trainer):
                continue
            found = data and measured_from(self._run, index, data, device_peak_bytes=self._peak())
            report.take(self._trainer, found, reason)
            store(report.path, report.to_dict())
