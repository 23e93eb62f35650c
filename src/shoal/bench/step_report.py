"""Figures of the step benchmark: medians after warm-up, MFU, tokens a second, and the ratio of two trainers."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shoal.bench.shapes import SHAPES, ModelShape
from shoal.bench.step_settings import StepSettings
from shoal.observe.summary import versions
from shoal.placement.architecture import Architecture, architecture_from_config
from shoal.placement.gpu_kinds import find_gpu_kind

_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one trainer did after its warm-up.

    Attributes:
        step_s: Median seconds of a step.
        phases: Median seconds by phase.
        samples: The seconds of every measured step.
        phase_samples: The same by phase.
        tokens: Completion tokens of every measured step.
        peak_bytes: Most that torch held on the first trainer's GPU (resident memory on CPUs).
        device_peak_bytes: Most that was used on the fullest GPU, by all processes, beyond what was used before.
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


def measured_from(settings: StepSettings, data: Mapping[str, Any], *, device_peak_bytes: int) -> Measured:
    """Leave the warm-up out of what a trainer wrote down, and take medians."""

    def kept(values: Sequence[Any]) -> list[Any]:
        return list(values[settings.warmup_steps : settings.warmup_steps + settings.steps])

    phases = {name: kept(seconds) for name, seconds in data["phases"].items()}
    return Measured(
        step_s=statistics.median(kept(data["step_s"])),
        phases={name: statistics.median(seconds) for name, seconds in phases.items() if seconds},
        samples=kept(data["step_s"]),
        phase_samples=phases,
        tokens=kept(data["tokens"]),
        peak_bytes=int(data["peak_bytes"]),
        device_peak_bytes=device_peak_bytes,
        notes=list(data["notes"]),
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


def step_flops(settings: StepSettings, *, trains_matrices: bool = True) -> float:
    """Return the operations of one step's training, recomputation not counted: the mean over the measured steps.

    Args:
        settings: What is done.
        trains_matrices: Not so beside an adapter.
    """
    model = architecture_of(SHAPES[settings.model_shape])
    steps = range(settings.warmup_steps, settings.warmup_steps + settings.steps)
    total = 0.0
    for step in steps:
        lengths = [settings.prompt_tokens + length for length in settings.lengths(step)]
        mean_square = sum(length**2 for length in lengths) / sum(lengths)
        total += model.training_flops(sum(lengths), mean_square, trains_matrices=trains_matrices)
    return total / len(steps)


@dataclass(slots=True, kw_only=True)
class StepReport:
    """Filled in trainer by trainer.

    Attributes:
        settings: What was measured.
        device_names: Of the GPUs, or the CPU.
        shoal: Shoal's figures.
        trl: TRL's.
        reasons: Why figures are missing, by trainer.
    """

    settings: StepSettings
    device_names: Sequence[str]
    shoal: Measured | None = None
    trl: Measured | None = None
    reasons: dict[str, str] = field(default_factory=dict)

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

    def lines(self, name: str, found: Measured) -> str:
        """Write one trainer's figures."""
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in found.phases.items())
        mfu = self.mfu(found)
        share = "not known for this device" if mfu is None else f"{mfu:.1%}"
        return "\n".join(
            [
                f"{name:<6} {found.step_s:8.2f} s a step ({phases})",
                f"{'':<6} {self.tokens_per_s(found):8,.0f} completion tokens/s; MFU of the training part {share}; "
                f"peak memory {found.peak_bytes / _GIB:.2f} GiB of the trainer, {found.device_peak_bytes / _GIB:.2f} "
                "GiB in all",
                *(f"{'':<6} {note}" for note in found.notes),
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
        return step_flops(self.settings) / (found.phases["train"] * self.settings.num_ranks * kind.flops)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, of plain JSON types."""
        ours, theirs = self.shoal, self.trl
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


def default_path(settings: StepSettings) -> Path:
    """Return where the results go unless the user says otherwise."""
    date = datetime.now(UTC).date().isoformat()
    return Path("benchmarks/results") / f"{date}-{settings.device}-step" / f"{settings.name}.json"


def _trl_version() -> dict[str, str]:
    from importlib import metadata

    try:
        return {"trl": metadata.version("trl")}
    except metadata.PackageNotFoundError:
        return {}
