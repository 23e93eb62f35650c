"""What one start of a trainer measures: parts that differ in the completions' lengths, one after the other."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from shoal.bench.step_settings import StepSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlace:
    """Where a trainer's step belongs.

    Attributes:
        part: The part.
        step: Number of the step within it.
    """

    part: StepSettings
    step: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of every completion of the step, by its place in the batch."""
        return self.part.lengths(self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRun:
    """The parts, at least one, in their order: a trainer's start takes longer than its steps.

    Attributes:
        parts: Alike in all but lengths.
    """

    parts: tuple[StepSettings, ...]

    @property
    def common(self) -> StepSettings:
        """The first part, for what is the same in all."""
        return self.parts[0]

    @property
    def num_steps(self) -> int:
        """Of all parts, warm-ups included."""
        return sum(part.num_steps for part in self.parts)

    @property
    def longest_completion(self) -> int:
        """Tokens that an engine must have room for beside a prompt."""
        return max(part.completion_tokens for part in self.parts)

    @property
    def begins(self) -> list[int]:
        """The trainer's step that each part begins with."""
        return list(accumulate((part.num_steps for part in self.parts[:-1]), initial=0))

    def place(self, step: int) -> StepPlace:
        """Return where the trainer's step of this number belongs."""
        index = bisect_right(self.begins, step) - 1
        return StepPlace(part=self.parts[index], step=step - self.begins[index])

    def to_json(self) -> str:
        """Serialise; `from_json` is the inverse."""
        return json.dumps([asdict(part) for part in self.parts])

    @classmethod
    def from_json(cls, text: str) -> StepRun:
        """Parse what `to_json` wrote."""
        return cls(parts=tuple(StepSettings(**part) for part in json.loads(text)))


def trainer_arguments(run: StepRun, output_dir: Path) -> dict[str, Any]:
    """Return the settings that Shoal and TRL have in common."""
    settings = run.common
    return {
        "output_dir": str(output_dir),
        "max_steps": run.num_steps,
        "num_generations": settings.num_generations,
        "max_completion_length": run.longest_completion,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": settings.checkpoints,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": settings.seed,
        "beta": 0.0,
        "use_cpu": settings.device == "cpu",
        "bf16": settings.device == "cuda",
        "model_init_kwargs": {"dtype": "float32"},
        "disable_tqdm": True,
    }
