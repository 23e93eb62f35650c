"""Figures of the step benchmark: medians after warm-up, MFU, tokens a second, and the ratio of two trainers."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

from shoal.bench.shapes import SHAPES, ModelShape
from shoal.bench.step_run import StepRun
from shoal.bench.step_settings import StepSettings
from shoal.observe.summary import versions
from shoal.placement.architecture import Architecture, architecture_from_config
from shoal.placement.gpu_kinds import find_gpu_kind

Trainer: TypeAlias = Literal["shoal", "trl"]

_GIB = 1 << 30
_TITLES: Mapping[Trainer, str] = {"shoal": "Shoal", "trl": "TRL"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one trainer did after its warm-up.

    Attributes:
        step_s: Median seconds of a step.
        phases: Median seconds by phase.
        samples: The seconds of every measured step.
        phase_samples: The same by phase.
        tokens: Completion tokens of every measured step.
        peak_bytes: Most that torch held on the first trainer's GPU in the part (resident memory on CPUs).
        device_peak_bytes: Most that was used on the fullest GPU, by all processes, beyond what was used before the
            trainer started: until the part's end, so that of a second part holds that of the first.
        notes: What should be known about it.
    """

    step_s: float
    phases: Mapping[str, float]
    samples: Sequence[float]
    phase_samples: Mapping[str, Sequence[float]]
    tokens: Sequence[int]
    peak_bytes: int
    device_peak_bytes: int
    notes: Sequence[str]


def measured_from(run: StepRun, index: int, data: Mapping[str, Any], *, device_peak_bytes: int) -> Measured | None:
    """Leave all but a part's measured steps out of what a trainer wrote down, and take medians.

    Args:
        run: What the trainer does.
        index: Of the part.
        data: Of all the trainer's steps so far.
        device_peak_bytes: Most that was used so far.

    Returns:
        The figures of the steps that were measured; None if none was.
    """
    settings, begin = run.parts[index], run.begins[index]

    def kept(values: Sequence[Any]) -> list[Any]:
        return list(values[begin + settings.warmup_steps : begin + settings.num_steps])

    if not kept(data["step_s"]):
        return None
    phases = {name: kept(seconds) for name, seconds in data["phases"].items()}
    notes = list(data["notes"])
    if len(run.parts) > 1:
        room = f"with room for completions of {run.longest_completion} tokens"
        notes.append(f"part {index + 1} of {len(run.parts)} measured in one start of the trainer, {room}")
    return Measured(
        step_s=statistics.median(kept(data["step_s"])),
        phases={name: statistics.median(seconds) for name, seconds in phases.items() if seconds},
        samples=kept(data["step_s"]),
        phase_samples=phases,
        tokens=kept(data["tokens"]),
        peak_bytes=max(data["peak_bytes"][begin : begin + settings.num_steps]),
        device_peak_bytes=device_peak_bytes,
        notes=notes,
    )


def architecture_of(shape: ModelShape) -> Architecture:
    """Return what the models of the benchmarks are made of."""
    return architecture_from_config(
        {
            "model_type": "qwen3",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocabulary,
            "tie_word_embeddings": shape.is_tied,
        }
    )


def step_flops(settings: StepSettings, *, num_steps: int | None = None, trains_matrices: bool = True) -> float:
    """Return the operations of one step's training, recomputation not counted: the mean over the measured steps.

    Args:
        settings: What is done.
        num_steps: Only so many of the measured steps, the first; None for all.
        trains_matrices: Not so beside an adapter.
    """
    model = architecture_of(SHAPES[settings.model_shape])
    steps = range(settings.warmup_steps, settings.warmup_steps + (num_steps or settings.steps))
    total = 0.0
    for step in steps:
        lengths = [settings.prompt_tokens + length for length in settings.lengths(step)]
        mean_square = sum(length**2 for length in lengths) / sum(lengths)
        total += model.training_flops(sum(lengths), mean_square, trains_matrices=trains_matrices)
    return total / len(steps)


@dataclass(slots=True, kw_only=True)
class StepReport:
    """Filled in trainer by trainer, of one part.

    Attributes:
        settings: What was measured.
        device_names: Of the GPUs, or the CPU.
        path: Where it is stored.
        found: The figures, by trainer.
        reasons: Why figures are missing or are of fewer steps, by trainer.
    """

    settings: StepSettings
    device_names: Sequence[str]
    path: Path
    found: dict[Trainer, Measured] = field(default_factory=dict)
    reasons: dict[Trainer, str] = field(default_factory=dict)

    def is_complete(self, trainer: Trainer) -> bool:
        """Return whether every step of a trainer was measured."""
        found = self.found.get(trainer)
        return found is not None and len(found.samples) == self.settings.steps

    def take(self, trainer: Trainer, found: Measured | None, reason: str) -> None:
        """Note a trainer's figures so far, and why they are not of all steps if they are not."""
        if found is not None:
            self.found[trainer] = found
            reason = f"only {len(found.samples)} of {self.settings.steps} steps were measured: {reason}"
        if self.is_complete(trainer):
            self.reasons.pop(trainer, None)
        else:
            self.reasons[trainer] = reason

    def headline(self) -> str:
        """Say what is done."""
        settings = self.settings
        most = settings.completion_tokens
        lengths = f"16 to {most}" if settings.is_ragged else str(most)
        return (
            f"{settings.model_shape}, {settings.num_prompts} prompts of {settings.prompt_tokens} tokens x "
            f"{settings.num_generations} completions of {lengths} tokens; {settings.layout}, {settings.num_ranks} "
            f"trainer process(es), {settings.num_engines} engine(s) of {settings.tensor_parallel_size} on "
            f"{', '.join(sorted(set(self.device_names)))}; medians of {settings.steps} steps after "
            f"{settings.warmup_steps}"
        )

    def lines(self, trainer: Trainer) -> str:
        """Write one trainer's figures, or why there are none."""
        found, reason = self.found.get(trainer), self.reasons.get(trainer)
        title = f"{_TITLES[trainer]}, {self.settings.lengths_name}"
        if found is None:
            return f"no {title}: {reason}"
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in found.phases.items())
        mfu = self.mfu(found)
        share = "not known for this device" if mfu is None else f"{mfu:.1%}"
        return "\n".join(
            [
                f"{title:<13} {found.step_s:8.2f} s a step ({phases})",
                f"{'':<13} {self.tokens_per_s(found):8,.0f} completion tokens/s; MFU of the training part {share}; "
                f"peak memory {found.peak_bytes / _GIB:.2f} GiB of the trainer, {found.device_peak_bytes / _GIB:.2f} "
                "GiB in all",
                *(f"{'':<13} {note}" for note in [*found.notes, *([reason] if reason else [])]),
            ]
        )

    def tokens_per_s(self, found: Measured) -> float:
        """Return completion tokens a second of whole steps."""
        return statistics.median(found.tokens) / found.step_s if found.tokens else 0.0

    def mfu(self, found: Measured) -> float | None:
        """Return the share of the trainers' peak that the training part reaches; None for a device not known."""
        kind = find_gpu_kind(self.device_names[0])
        if kind is None or "train" not in found.phases:
            return None
        flops = step_flops(self.settings, num_steps=len(found.samples))
        return flops / (found.phases["train"] * self.settings.num_ranks * kind.flops)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, of plain JSON types."""
        ours, theirs = self.found.get("shoal"), self.found.get("trl")
        return {
            "benchmark": "step",
            "layout": self.settings.layout,
            "step_s": None if ours is None else round(ours.step_s, 4),
            "trl_step_s": None if theirs is None else round(theirs.step_s, 4),
            "ratio_to_trl": None if ours is None or theirs is None else round(theirs.step_s / ours.step_s, 3),
            "mfu": None if ours is None else self.mfu(ours),
            "tokens_per_s": None if ours is None else round(self.tokens_per_s(ours), 1),
            "trl_mfu": None if theirs is None else self.mfu(theirs),
            "trl_tokens_per_s": None if theirs is None else round(self.tokens_per_s(theirs), 1),
            "peak_bytes": None if ours is None else ours.peak_bytes,
            "trl_peak_bytes": None if theirs is None else theirs.peak_bytes,
            "phases": None if ours is None else dict(ours.phases),
            "trl_phases": None if theirs is None else dict(theirs.phases),
            "training_flops": step_flops(self.settings),
            "shoal": None if ours is None else asdict(ours),
            "trl": None if theirs is None else asdict(theirs),
            "settings": asdict(self.settings),
            "versions": versions() | _trl_version(),
            "devices": list(self.device_names),
            "platform": platform.platform(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "reasons": self.reasons,
        }


def run_of(reports: Sequence[StepReport]) -> StepRun:
    """Return what a trainer does whose figures go into these reports."""
    return StepRun(parts=tuple(report.settings for report in reports))


def result_paths(run: StepRun, output: Path | None) -> list[Path]:
    """Return where the results of each part go.

    Args:
        run: The parts.
        output: What the user says: the file of the only part, or what those of several differ from by the lengths'
            name; None for the usual place.
    """
    if output is not None:
        several = len(run.parts) > 1
        return [output.with_stem(f"{output.stem}-{part.lengths_name}") if several else output for part in run.parts]
    date = datetime.now(UTC).date().isoformat()
    folder = Path("benchmarks/results") / f"{date}-{run.common.device}-step"
    return [folder / f"{part.name}.json" for part in run.parts]


def _trl_version() -> dict[str, str]:
    from importlib import metadata

    try:
        return {"trl": metadata.version("trl")}
    except metadata.PackageNotFoundError:
        return {}
