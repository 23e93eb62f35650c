"""What a part of the step benchmark does: the same steps for every trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from shoal.bench.shapes import SHAPES, qwen3_config
from shoal.errors import ConfigError

StepLayout: TypeAlias = Literal["dedicated", "colocated"]
StepSharding: TypeAlias = Literal["ddp", "fsdp2"]

SHORTEST_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """What is done and where.

    Attributes:
        model_shape: One of `SHAPES`, with random weights.
        device: Of trainers and engines.
        layout: Engines on GPUs of their own, or on the trainers'.
        num_ranks: Trainer processes, on the first GPUs.
        num_engines: Engines; in a colocated layout they share the ranks' GPUs evenly.
        tensor_parallel_size: Of each engine.
        num_prompts: Prompts of a step.
        num_generations: Completions of each.
        prompt_tokens: Of every prompt.
        completion_tokens: Of every completion; of the longest where lengths are ragged.
        is_ragged: Lengths are uniform from `SHORTEST_TOKENS` to `completion_tokens`, instead of all alike.
        steps: Measured.
        warmup_steps: Before them.
        sharding: How several ranks hold the model.
        checkpoints: Gradient checkpointing.
        max_tokens_per_micro_batch: Shoal's; None for its default.
        trl_micro_batch: Completions of one of TRL's forward passes.
        sleeps: Engines of a colocated layout sleep while the trainers work.
        gpu_memory_utilization: vLLM's; None for the trainer's default.
        seed: Of weights, order and samples.
    """

    model_shape: str
    device: Literal["cpu", "cuda"]
    layout: StepLayout = "dedicated"
    num_ranks: int = 1
    num_engines: int = 1
    tensor_parallel_size: int = 1
    num_prompts: int = 32
    num_generations: int = 8
    prompt_tokens: int = 64
    completion_tokens: int = 510
    is_ragged: bool = False
    steps: int = 5
    warmup_steps: int = 2
    sharding: StepSharding = "ddp"
    checkpoints: bool = True
    max_tokens_per_micro_batch: int | None = None
    trl_micro_batch: int = 8
    sleeps: bool = False
    gpu_memory_utilization: float | None = None
    seed: int = 0

    @property
    def num_steps(self) -> int:
        """Of the part, warm-up included."""
        return self.warmup_steps + self.steps

    @property
    def num_completions(self) -> int:
        """Of one step."""
        return self.num_prompts * self.num_generations

    @property
    def completions_per_rank(self) -> int:
        """Of one step, on each trainer process."""
        return self.num_completions // self.num_ranks

    @property
    def engine_devices(self) -> tuple[int, ...]:
        """GPUs of the engines, by torch's numbers; empty on CPUs."""
        if self.device == "cpu":
            return ()
        first = 0 if self.layout == "colocated" else self.num_ranks
        return tuple(range(first, first + self.num_engines * self.tensor_parallel_size))

    @property
    def num_gpus(self) -> int:
        """GPUs that are used."""
        return 0 if self.device == "cpu" else max(self.num_ranks, 1 + max(self.engine_devices))

    @property
    def lengths_name(self) -> str:
        """How the completions' lengths are."""
        return "ragged" if self.is_ragged else "fixed"

    @property
    def name(self) -> str:
        """Of the work and the layout, fit for a file's name."""
        sharding = f"-{self.sharding}" if self.num_ranks > 1 else ""
        engines = f"{self.num_engines}xtp{self.tensor_parallel_size}"
        layout = f"{self.layout}-{self.num_ranks}{sharding}-to-{engines}-{self.device}"
        return f"step-{self.model_shape}-{self.lengths_name}-{layout}"

    def lengths(self, step: int) -> list[int]:
        """Return the tokens of every completion of one of the part's steps, by its place in the batch.

        They are the same for every trainer, and whatever was measured before the part.
        """
        if not self.is_ragged:
            return [self.completion_tokens] * self.num_completions
        random = np.random.default_rng([self.seed, step])
        lengths = random.integers(SHORTEST_TOKENS, self.completion_tokens + 1, self.num_completions)
        return [int(length) for length in lengths]


def check_step(settings: StepSettings, num_gpus: int) -> None:
    """Refuse what cannot be run.

    Raises:
        ConfigError: A count makes no sense, or the GPUs are too few.
    """
    for name in ("num_ranks", "num_engines", "tensor_parallel_size", "num_prompts", "prompt_tokens", "steps"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)} leaves nothing to measure. Give at least 1.")
    if settings.num_generations < 2:
        raise ConfigError(f"num_generations={settings.num_generations} leaves nothing to compare. Give at least 2.")
    option, fewest = ("--ragged-tokens", SHORTEST_TOKENS) if settings.is_ragged else ("--tokens", 1)
    if settings.completion_tokens < fewest:
        raise ConfigError(f"{option} {settings.completion_tokens} is too few. Give at least {fewest}.")
    room = SHAPES[settings.model_shape].max_tokens
    if settings.prompt_tokens + settings.completion_tokens > room:
        raise ConfigError(
            f"prompts of {settings.prompt_tokens} and completions of {settings.completion_tokens} tokens "
            f"({settings.lengths_name} lengths, {option}) do not fit into the {room} of {settings.model_shape}. Give "
            f"at most {option} {room - settings.prompt_tokens}, or shorter prompts (--prompt-tokens)."
        )
    per_forward = settings.num_ranks * settings.trl_micro_batch
    if settings.num_completions % settings.num_ranks or settings.num_completions % per_forward:
        raise ConfigError(
            f"{settings.num_completions} completions of a step do not divide by {settings.num_ranks} trainer processes "
            f"x {settings.trl_micro_batch} completions of a forward pass in TRL. Change one (--trl-micro-batch)."
        )
    if settings.device == "cpu" and (settings.num_ranks > 1 or settings.layout == "colocated" or settings.sleeps):
        raise ConfigError(
            "on CPUs one trainer process and engines beside it are measured. Leave out what is about GPUs."
        )
    if settings.sharding == "fsdp2" and settings.num_ranks == 1:
        raise ConfigError("--sharding fsdp2 is for several trainer processes. Give --ranks 2 or more.")
    if settings.num_gpus > num_gpus and settings.device == "cuda":
        raise ConfigError(
            f"{settings.num_gpus} GPUs are needed ({settings.num_ranks} trainer processes, {settings.num_engines} "
            f"engines of {settings.tensor_parallel_size}), and this process sees {num_gpus}. Give fewer, or --layout "
            "colocated."
        )


def write_model(settings: StepSettings, folder: Path) -> None:
    """Write the model that is trained, with random weights, and a tokenizer whose tokens are bytes."""
    import torch
    from transformers import Qwen3ForCausalLM

    from shoal.testing import tiny_tokenizer

    torch.manual_seed(settings.seed)
    config = qwen3_config(SHAPES[settings.model_shape])
    dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def make_dataset(settings: StepSettings) -> Any:
    """Return prompts of `prompt_tokens` bytes, each another."""
    from datasets import Dataset

    number = max(256, 4 * settings.num_prompts)
    return Dataset.from_list(
        [{"prompt": f"{index:0{settings.prompt_tokens}d}"[-settings.prompt_tokens :]} for index in range(number)]
    )


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return rewards that differ within a group, so that there is a gradient."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]
