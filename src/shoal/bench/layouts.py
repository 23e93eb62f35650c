"""Which layouts are measured on how many GPUs, with which commands, and what is expected of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from shoal.errors import ConfigError

Part: TypeAlias = Literal["weights", "rollouts", "rollouts_one", "step"]

PARTS: tuple[Part, ...] = ("weights", "rollouts", "rollouts_one", "step")

# Written before the first run (issue 6).
EXPECTED_ROLLOUT_SCALING = 0.95
"""Tokens a second of E engines, over E times those of one engine: at least this."""
EXPECTED_PUBLISH_MS = {("fsdp2-4-to-1xtp4", "qwen3-8b"): 60.0}
"""Milliseconds of a whole publish, by layout and model: at most this."""
EXPECTED_NO_SLOWER_THAN = "plain-1-to-1xtp1"
"""No layout's step takes longer than this one's, which has two GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLayout:
    """Trainer processes and engines on one host.

    Attributes:
        num_ranks: Trainer processes.
        num_engines: Engines.
        tensor_parallel_size: Of each.
        source: How the trainers hold the model.
        is_colocated: Engines are on the trainers' GPUs.
    """

    num_ranks: int
    num_engines: int
    tensor_parallel_size: int = 1
    source: Literal["plain", "ddp", "fsdp2"] = "fsdp2"
    is_colocated: bool = False

    @property
    def num_gpus(self) -> int:
        """GPUs that it takes."""
        engines = self.num_engines * self.tensor_parallel_size
        return max(self.num_ranks, engines) if self.is_colocated else self.num_ranks + engines

    @property
    def name(self) -> str:
        """Such as `"fsdp2-2-to-2xtp1"`."""
        where = "-colocated" if self.is_colocated else ""
        return f"{self.source}-{self.num_ranks}-to-{self.num_engines}xtp{self.tensor_parallel_size}{where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is measured in every layout.

    Attributes:
        device: `"cpu"` or `"cuda"`.
        weights_shape: Model of the publishes.
        step_shape: Model of steps and rollouts.
        prompts: Of a step.
        samples: Of each prompt.
        tokens: Of every completion.
        steps: Behind a median.
        repeats: Publishes behind a median.
        running_requests: Completions under way during publishes.
        timeout_s: For each trainer of the step benchmark, and for each other command.
    """

    device: Literal["cpu", "cuda"] = "cuda"
    weights_shape: str = "qwen3-8b"
    step_shape: str = "qwen3-1.4b"
    prompts: int = 32
    samples: int = 8
    tokens: int = 510
    steps: int = 5
    repeats: int = 20
    running_requests: int = 256
    timeout_s: int = 900


TINY = Work(
    device="cpu", weights_shape="tiny", step_shape="tiny", prompts=4, samples=2, tokens=24, steps=2, repeats=3,
    running_requests=4,
)  # fmt: skip

_TWO = MachineLayout(num_ranks=1, num_engines=1, source="plain")


def _colocated(num_gpus: int) -> MachineLayout:
    return MachineLayout(num_ranks=num_gpus, num_engines=num_gpus, source="ddp", is_colocated=True)


_BY_SIZE: Mapping[int, tuple[MachineLayout, ...]] = {
    2: (_colocated(2),),
    4: (
        MachineLayout(num_ranks=2, num_engines=2),
        MachineLayout(num_ranks=2, num_engines=1, tensor_parallel_size=2),
        MachineLayout(num_ranks=3, num_engines=1),
        _colocated(4),
    ),
    8: (
        MachineLayout(num_ranks=4, num_engines=4),
        MachineLayout(num_ranks=4, num_engines=2, tensor_parallel_size=2),
        MachineLayout(num_ranks=4, num_engines=1, tensor_parallel_size=4),
        MachineLayout(num_ranks=6, num_engines=2),
        _colocated(8),
    ),
}


def layouts_for(num_gpus: int) -> tuple[MachineLayout, ...]:
    """Return what is measured on a host: the layout on two GPUs first, to compare with, then those of the size.

    Of a size between those that are written down, the next smaller one's, and everything shared.

    Raises:
        ConfigError: There are fewer than two GPUs.
    """
    sizes = [size for size in _BY_SIZE if size <= num_gpus]
    if not sizes:
        raise ConfigError(
            f"{num_gpus} GPU(s) hold none of the layouts: they take 2, 4, 8 or more. Use --device cpu here."
        )
    found = [_TWO, *_BY_SIZE[max(sizes)]]
    if num_gpus not in _BY_SIZE:
        found.append(_colocated(num_gpus))
    return tuple(found)


def commands_for(layout: MachineLayout, work: Work, folder: Path) -> dict[Part, list[str]]:
    """Return what is run for a layout, part by part; each writes or prints one JSON object."""
    shoal = [sys.executable, "-m", "shoal"]
    engines = ["--num-engines", str(layout.num_engines), "--tp", str(layout.tensor_parallel_size)]
    commands: dict[Part, list[str]] = {
        "weights": [
            *_launcher(layout.num_ranks), "bench", "weights", "--device", work.device,
            "--model-shape", work.weights_shape, *engines, "--source", layout.source,
            *(["--colocate"] if layout.is_colocated else []),
            "--repeats", str(work.repeats), "--running-requests", str(work.running_requests), "--skip-native",
            "--output", str(folder / f"{layout.name}-weights.json"),
        ],
        "step": [
            *shoal, "bench", "step", "--device", work.device, "--model-shape", work.step_shape,
            "--layout", "colocated" if layout.is_colocated else "dedicated", "--ranks", str(layout.num_ranks), *engines,
            "--sharding", "fsdp2" if layout.source == "fsdp2" else "ddp",
            "--prompts", str(_prompts(layout, work)), "--samples", str(work.samples), "--tokens", str(work.tokens),
            "--steps", str(work.steps), "--warmup-steps", "1" if work.device == "cpu" else "2",
            "--trl-micro-batch", str(work.samples), "--timeout-s", str(work.timeout_s),
            "--output", str(folder / f"{layout.name}-step.json"),
        ],
    }  # fmt: skip
    if layout.tensor_parallel_size == 1 and not layout.is_colocated:
        rollouts = [
            *shoal, "bench", "rollouts", "--device", work.device, "--model-shape", work.step_shape,
            "--samples", str(work.samples), "--tokens", str(work.tokens), "--engines",
        ]  # fmt: skip
        commands["rollouts"] = [*rollouts, str(layout.num_engines)]
        if layout.num_engines > 1:
            commands["rollouts_one"] = [*rollouts, "1"]
    return {part: commands[part] for part in PARTS if part in commands}


def _launcher(num_ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, *(launcher if num_ranks > 1 else []), "-m", "shoal"]


def _prompts(layout: MachineLayout, work: Work) -> int:
    """Return as many prompts as `work` has, or a few more, so that every rank gets as many completions."""
    return -(-work.prompts // layout.num_ranks) * layout.num_ranks
