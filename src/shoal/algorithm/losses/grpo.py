"""The GRPO loss: the mean over sequences of the mean over their tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shoal.algorithm.losses.clipped import clipped_surrogate
from shoal.algorithm.losses.records import Loss


def token_weights(completion_lengths: npt.NDArray[np.int64], in_loss: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Weigh each token by 1 / (sequences of the step x tokens of its sequence).

    Equation 3 of https://arxiv.org/abs/2402.03300. A sequence that is not in the loss adds nothing but still counts
    among the sequences, as in TRL.

    Args:
        completion_lengths: `[S]` int64, of all sequences of the step: tokens that the policy wrote.
        in_loss: `[S]` bool.
    """
    counts = in_loss & (completion_lengths > 0)
    return np.where(counts, 1.0 / (max(len(counts), 1) * np.maximum(completion_lengths, 1)), 0.0)


GRPO = Loss(token_weights=token_weights, token_loss=clipped_surrogate)
