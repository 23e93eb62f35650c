"""Say which prompts each step takes, as a pure function of the step, so that resuming needs no saved state."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from shoal.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSchedule:
    """Epochs over the dataset, each in its own order, in steps of equal size.

    Like TRL's `RepeatSampler`, an epoch drops the prompts that do not fill a last step; when shuffling, the next
    epoch drops others.

    Attributes:
        num_prompts: Rows of the dataset.
        prompts_per_step: Prompts that a step takes.
        seed: Seed of the order, 0 or more.
        shuffle: Whether each epoch has a new random order; otherwise the dataset's.

    Raises:
        ConfigError: A step takes more prompts than there are, or none; or the seed is negative.
    """

    num_prompts: int
    prompts_per_step: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if self.prompts_per_step < 1:
            raise ConfigError(
                f"A step takes {self.prompts_per_step} prompts, so there is nothing to generate. "
                "Make the number of completions per step at least num_generations."
            )
        if self.prompts_per_step > self.num_prompts:
            raise ConfigError(
                f"A step takes {self.prompts_per_step} different prompts, but the dataset has only {self.num_prompts}, "
                "so no epoch has a whole step. Use a larger dataset, or take fewer prompts per step (a smaller "
                "generation_batch_size, or a larger num_generations at the same size)."
            )
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} is negative, which no random generator takes. Use 0 or more.")

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole steps in an epoch, at least 1."""
        return self.num_prompts // self.prompts_per_step

    def rows(self, step: int) -> tuple[int, ...]:
        """Give the dataset rows of a step, counted from 0 over all epochs; all different."""
        assert step >= 0, f"step {step} is negative"
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.prompts_per_step
        end = start + self.prompts_per_step
        if not self.shuffle:
            return tuple(range(start, end))
        return tuple(_shuffled(self.num_prompts, self.seed, epoch)[start:end].tolist())


@functools.lru_cache(maxsize=4)  # consecutive steps are of one epoch
def _shuffled(num_prompts: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Give the order of all rows in an epoch.

    Sorted by raw random words rather than shuffled by `Generator.permutation`: NumPy promises the same PCG64 and
    SeedSequence in every version, but not the same permutation (NEP 19), and a run may resume on another NumPy.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_prompts)
    return np.argsort(words, kind="stable")
