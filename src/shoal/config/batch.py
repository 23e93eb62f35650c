"""Rules for batches of completions; they need the number of processes, so they run last."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.config.grpo_config import GRPOConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSuggestion:
    """For each setting of the batch, values that make groups whole while the others stay as they are.

    Attributes:
        num_generations: Divisors of the batch, from 2; the nearest to the present value first, at most three.
        per_device_train_batch_size: The next larger size that works.
        gradient_accumulation_steps: The next larger number that works.
    """

    num_generations: tuple[int, ...]
    per_device_train_batch_size: int
    gradient_accumulation_steps: int


def suggest_batch(*, per_device: int, world_size: int, accumulation: int, num_generations: int) -> BatchSuggestion:
    """Find values near the present ones for which groups of `num_generations` fill the batch exactly."""
    batch = per_device * world_size * accumulation
    divisors = (size for size in range(2, batch + 1) if batch % size == 0)
    nearest = sorted(divisors, key=lambda size: (abs(size - num_generations), size))
    return BatchSuggestion(
        num_generations=tuple(nearest[:3]),
        per_device_train_batch_size=_next_fitting(per_device, world_size * accumulation, num_generations),
        gradient_accumulation_steps=_next_fitting(accumulation, per_device * world_size, num_generations),
    )


def groups_fill_the_batch(config: GRPOConfig) -> None:
    """Refuse a batch that would end in the middle of a group."""
    step, group = config.completions_per_step, config.num_generations
    batch = step * config.parts_per_batch
    if batch % group == 0:
        return
    if config.parts_per_batch > 1:
        raise ConfigError(
            f"num_generations={group} does not divide the {batch} completions that are written at once for "
            f"{config.parts_per_batch} optimizer steps of {step}: a prompt's completions are compared with one "
            f"another, so a group cannot be cut. Set generation_batch_size={math.lcm(step, group)} or a multiple of "
            f"it, or a num_generations that divides {batch}."
        )
    found = suggest_batch(
        per_device=config.per_device_train_batch_size,
        world_size=config.world_size,
        accumulation=config.gradient_accumulation_steps,
        num_generations=group,
    )
    sizes = " or ".join(str(size) for size in found.num_generations)
    raise ConfigError(
        f"num_generations={group} does not divide the {batch} completions of one optimizer step "
        f"(per_device_train_batch_size={config.per_device_train_batch_size} x {config.world_size} process(es) x "
        f"gradient_accumulation_steps={config.gradient_accumulation_steps}): a prompt's completions are compared with "
        f"one another, so a group cannot be cut. Set {f'num_generations={sizes}, or ' if sizes else ''}"
        f"per_device_train_batch_size={found.per_device_train_batch_size}, or "
        f"gradient_accumulation_steps={found.gradient_accumulation_steps}."
    )


def batches_are_of_whole_steps(config: GRPOConfig) -> None:
    """Refuse batches of completions that end in the middle of an optimizer step, or of which there are two sizes."""
    sizes = {
        "generation_batch_size": (config.completions_per_step, "completions"),
        "steps_per_generation": (config.gradient_accumulation_steps, "micro-steps"),
    }
    for name, (step, unit) in sizes.items():
        value = getattr(config, name)
        if value is not None and value % step:
            raise ConfigError(
                f"{name}={value} is not a whole number of optimizer steps, each of {step} {unit}. Set it to a multiple "
                f"of {step}, or remove it: then {name}={step}."
            )
    batch, micro_steps = config.generation_batch_size, config.steps_per_generation
    micro_step = config.completions_per_step // config.gradient_accumulation_steps
    if batch is not None and micro_steps is not None and batch != micro_steps * micro_step:
        raise ConfigError(
            f"generation_batch_size={batch} and steps_per_generation={micro_steps} (of {micro_step} completions each) "
            "are two sizes of one batch. Remove one of them."
        )


def processes_see_whole_sequences(config: GRPOConfig) -> None:
    """Refuse splitting a sequence over processes: batches are made after generation, on each process."""
    parallelism = config.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ConfigError(
            f"parallelism_config with cp_size={parallelism.cp_size} and sp_size={parallelism.sp_size} splits sequences "
            "over processes, but each process packs whole sequences. Set both to 1."
        )


def batches_are_not_split_again(config: GRPOConfig) -> None:
    """Refuse accelerate's `split_batches`, which would change what `per_device_train_batch_size` means."""
    if config.accelerator_config.split_batches:
        raise ConfigError(
            "accelerator_config has split_batches=True, but per_device_train_batch_size counts the completions of one "
            "process. Set split_batches to False."
        )


BATCH_RULES: tuple[Callable[[GRPOConfig], None], ...] = (
    processes_see_whole_sequences,
    batches_are_not_split_again,
    batches_are_of_whole_steps,
    groups_fill_the_batch,
)
"""Every rule about the batch, in the order in which they are checked."""


def _next_fitting(value: int, others: int, group: int) -> int:
    """Return the smallest number from `value` up whose product with `others` is a multiple of `group`."""
    return next(number for number in range(value, value + group) if number * others % group == 0)
