"""Say which prompts each batch takes, as a pure function of its number, so that resuming needs no saved state."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from shoal.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSchedule:
    """Epochs over the dataset, each in its own order, in batches of equal size.

    Like TRL's `RepeatSampler`, an epoch drops the prompts that do not fill a last batch; when shuffling, the next
    epoch drops others.

    Attributes:
        num_prompts: Rows of the dataset.
        prompts_per_batch: Prompts whose completions are written at once.
        seed: Seed of the order, 0 or more.
        shuffle: Whether each epoch has a new random order; otherwise the dataset's.

    Raises:
        ConfigError: A batch takes more prompts than there are, or none; or the seed is negative.
    """

    num_prompts: int
    prompts_per_batch: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if self.prompts_per_batch < 1:
            raise ConfigError(
                f"A batch takes {self.prompts_per_batch} prompts, so there is nothing to generate. "
                "Make the number of completions written at once at least num_generations."
            )
        if self.prompts_per_batch > self.num_prompts:
            raise ConfigError(
                f"A batch takes {self.prompts_per_batch} different prompts, but the dataset has only "
                f"{self.num_prompts}, so no epoch has a whole one. Use a larger dataset, or take fewer prompts at once "
                "(a smaller generation_batch_size, or a larger num_generations at the same size)."
            )
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} is negative, which no random generator takes. Use 0 or more.")

    @property
    def batches_per_epoch(self) -> int:
        """Number of whole batches in an epoch, at least 1."""
        return self.num_prompts // self.prompts_per_batch

    def rows(self, batch: int) -> tuple[int, ...]:
        """Give the dataset rows of a batch, counted from 0 over all epochs; all different."""
        assert batch >= 0, f"batch {batch} is negative"
        epoch, position = divmod(batch, self.batches_per_epoch)
        start = position * self.prompts_per_batch
        end = start + self.prompts_per_batch
        if not self.shuffle:
            return tuple(range(start, end))
        return tuple(random_order(self.num_prompts, self.seed, epoch)[start:end].tolist())


@functools.lru_cache(maxsize=4)  # consecutive batches are of one epoch
def random_order(size: int, *seeds: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Give the numbers below `size` in an order that follows from the seeds alone, `[size]`. It must not be changed.

    Sorted by raw random words rather than shuffled by `Generator.permutation`: NumPy promises the same PCG64 and
    SeedSequence in every version, but not the same permutation (NEP 19), and a run may resume on another NumPy.
    """
    words = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(size)
    return np.argsort(words, kind="stable")
