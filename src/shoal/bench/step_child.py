"""What the step benchmark's processes have in common: timing steps, and writing each down as soon as it is done."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from shoal.observe.files import replace_file

_PHASES = ("generate", "train", "publish", "sleep", "make_room", "wake")  # the last three of engines that sleep


@dataclass(slots=True, kw_only=True)
class StepTimes:
    """What one trainer did, step by step, warm-up included.

    Attributes:
        step_s: Seconds from the end of one step to that of the next.
        phases: Seconds by phase.
        tokens: Completion tokens of each step, over all ranks.
        peak_bytes: Most that this rank's torch held on its GPU since the step before; resident memory on CPUs.
        notes: What should be known about it.
    """

    step_s: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def phase(self, name: str, seconds: float) -> None:
        """Add a step's seconds of a phase."""
        self.phases.setdefault(name, []).append(seconds)

    def write(self, path: Path) -> None:
        """Write everything so far, on rank 0."""
        if os.environ.get("RANK", "0") == "0":
            replace_file(path, lambda part: part.write_text(json.dumps(asdict(self))))


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Times steps as the user sees them; must be the last callback, so that a publish counts for the step before it.

    Args:
        times: Where the seconds go.
        device: Whose work is waited for.
        path: Where the times are written after every step, so that those of a trainer that is ended remain.
    """

    def __init__(self, times: StepTimes, device: torch.device, path: Path) -> None:
        self._times = times
        self._device = device
        self._path = path
        self._before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin."""
        self._before = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a step's seconds and memory."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.monotonic()
        self._times.step_s.append(now - self._before)
        self._before = now
        if self._device.type == "cuda":
            self._times.peak_bytes.append(torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._times.peak_bytes.append(psutil.Process().memory_info().rss)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note the phases that the trainer has timed itself; the step is complete now, so write."""
        for name in _PHASES:
            if f"seconds/{name}" in logs:
                self._times.phase(name, logs[f"seconds/{name}"])
        self._times.write(self._path)
