"""The batch of completions at hand, and which part of it each optimizer step trains on, how many times over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from shoal.data.schedule import random_order
from shoal.types import MicroBatch
from shoal.types import Sequence as TrainingSequence

_SALT = 0xBA7C4  # keeps these draws apart from others of the same seed


@dataclass(slots=True)
class Part:
    """What one optimizer step trains on.

    Attributes:
        micro_batches: This rank's.
        is_empty: Whether nothing of it is in the loss, on any rank.
    """

    micro_batches: list[MicroBatch]
    is_empty: bool


class HeldBatch:
    """Parts of a batch in turn, the whole round as many times as there are iterations.

    The ratio of the loss is of the policy to the one before any update on the batch. In the batch's first step that is
    the policy itself, whose logprobs are kept for the later iterations if there are any; those of the other parts
    are computed before that step. With one part and one iteration neither happens.

    Args:
        num_parts: Optimizer steps that it takes to go through a batch once.
        num_iterations: How many times each batch is gone through.
        wants_old_logprobs: Whether the ratio is of two policies of the trainer, rather than of it and the engine.
    """

    def __init__(self, *, num_parts: int, num_iterations: int, wants_old_logprobs: bool) -> None:
        self._num_parts = num_parts
        self._num_steps = num_parts * num_iterations
        self._wants_old = wants_old_logprobs
        self._number: int | None = None
        self._parts: list[Part] = []
        self._current: Part | None = None
        self._kept: list[torch.Tensor] = []

    def number(self, step: int) -> int:
        """Return which batch a step trains on, counted from 0."""
        return step // self._num_steps

    def serves(self, step: int) -> bool:
        """Whether the batch at hand is the one for this step."""
        return self._number == self.number(step)

    def fill(self, step: int, parts: Sequence[Part], old_logprobs: Callable[[MicroBatch], torch.Tensor]) -> None:
        """Take a new batch.

        Args:
            step: The one that is about to train on it: not always the batch's first, where a run is resumed.
            parts: As many as there are.
            old_logprobs: Computes a micro-batch's logprobs, `[N]`, under the policy as it is. A collective.
        """
        assert len(parts) == self._num_parts
        self.clear()
        self._number, self._parts = self.number(step), list(parts)
        if not self._wants_old:
            return
        for index in sorted({later % self._num_parts for later in self._later(step)} - {step % self._num_parts}):
            part = self._parts[index]
            part.micro_batches = [replace(item, old_logprobs=old_logprobs(item)) for item in part.micro_batches]

    def part(self, step: int) -> Part:
        """Return what a step trains on, in its order."""
        assert self.serves(step)
        if self._current is not None and len(self._kept) == len(self._current.micro_batches):
            pairs = zip(self._current.micro_batches, self._kept, strict=True)
            self._current.micro_batches = [replace(item, old_logprobs=value) for item, value in pairs]
        part = self._parts[step % self._num_parts]
        is_first = all(item.old_logprobs is None for item in part.micro_batches)
        comes_again = step + self._num_parts in self._later(step)
        self._current = part if self._wants_old and is_first and comes_again else None
        self._kept = []
        return part

    def keep(self, logprobs: torch.Tensor) -> None:
        """Take note of the policy's logprobs of the next micro-batch of the part at hand, `[N]`."""
        if self._current is not None:
            self._kept.append(logprobs.detach())

    def clear(self) -> None:
        """Forget the batch."""
        self._number, self._parts, self._current, self._kept = None, [], None, []

    def _later(self, step: int) -> range:
        return range(step + 1, (self.number(step) + 1) * self._num_steps)


def deal(
    sequences: Sequence[TrainingSequence], num_parts: int, *, seed: int, number: int
) -> list[list[TrainingSequence]]:
    """Share a batch's sequences out to its parts, in a random order that all ranks draw alike.

    In the batch's own order a part would be of few prompts. A part that gets nothing, where rewards failed on nearly
    all, is of one sequence out of the loss, since every rank must have something to run.
    """
    if num_parts == 1:
        return [list(sequences)]
    order = random_order(len(sequences), seed, _SALT, number)
    shortest = min(sequences, key=lambda sequence: len(sequence.token_ids))
    return [
        [sequences[int(index)] for index in share] or [replace(shortest, in_loss=False)]
        for share in np.array_split(order, num_parts)
    ]
