"""The DAPO loss: the mean over all tokens of the step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shoal.algorithm.losses.clipped import clipped_surrogate
from shoal.algorithm.losses.records import Loss


def token_weights(completion_lengths: npt.NDArray[np.int64], in_loss: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Weigh each token by 1 / (tokens of the step that are in the loss): long completions count for more.

    Equation 12 of https://arxiv.org/abs/2503.14476.

    Args:
        completion_lengths: `[S]` int64, of all sequences of the step: tokens that the policy wrote.
        in_loss: `[S]` bool.
    """
    counts = in_loss & (completion_lengths > 0)
    num_tokens = max(int(completion_lengths[counts].sum()), 1)
    return np.where(counts, 1.0 / num_tokens, 0.0)


DAPO = Loss(token_weights=token_weights, token_loss=clipped_surrogate)
