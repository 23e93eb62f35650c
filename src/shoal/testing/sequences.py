"""Training sequences of chosen lengths, for what packs them and computes with them."""

from __future__ import annotations

import numpy as np

from shoal.types import Sequence

EDGES_OF_PACKING = ((1, 1), (5, 7), (1, 12), (5, 7), (30, 2), (3, 20))
"""Lengths of prompt and completion: a prompt of one token, neighbours of equal length, a long one of each."""


def random_sequences(lengths: tuple[tuple[int, int], ...] = EDGES_OF_PACKING, seed: int = 0) -> list[Sequence]:
    """Return sequences of tokens from 3 to 249, all in the loss.

    Args:
        lengths: For each, of prompt and completion, in tokens.
        seed: Of the tokens.
    """
    random = np.random.default_rng(seed)
    return [
        Sequence(
            token_ids=random.integers(3, 250, prompt + completion),
            prompt_length=prompt,
            advantage=1.0,
            rollout_logprobs=np.zeros(completion, np.float32),
            in_loss=True,
        )
        for prompt, completion in lengths
    ]
