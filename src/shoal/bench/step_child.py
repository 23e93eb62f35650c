"""What the step benchmark's processes have in common: timing steps, and writing down what was found."""

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


@dataclass(slots=True, kw_only=True)
class StepTimes:
    """What one trainer did, step by step, warm-up included.

    Attributes:
        step_s: Seconds from the end of one step to that of the next.
        phases: Seconds by phase.
        tokens: Completion tokens of each step, over all ranks.
        peak_bytes: Most that this rank's torch held on its GPU; resident memory on CPUs.
        notes: What should be known about it.
    """

    step_s: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def phase(self, name: str, seconds: float) -> None:
        """Add a step's seconds of a phase."""
        self.phases.setdefault(name, []).append(seconds)

    def write(self, path: Path, device: torch.device) -> None:
        """Write everything, on rank 0."""
        if device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(device)
        else:
            self.peak_bytes = psutil.Process().memory_info().rss
        if os.environ.get("RANK", "0") == "0":
            path.write_text(json.dumps(asdict(self)))


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Times steps as the user sees them; must be the last callback, so that a publish counts for the step before it.

    Args:
        times: Where the seconds go.
        device: Whose work is waited for.
    """

    def __init__(self, times: StepTimes, device: torch.device) -> None:
        self._times = times
        self._device = device
        self._before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin."""
        self._before = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a step's seconds."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.monotonic()
        self._times.step_s.append(now - self._before)
        self._before = now
