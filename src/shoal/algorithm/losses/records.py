"""What a loss is made of: how sequences share the one denominator, and what each token costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

ImportanceSamplingLevel: TypeAlias = Literal["token", "sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """How far the policy may move from the one that wrote the tokens; names and meanings are TRL's.

    Attributes:
        epsilon: A ratio below `1 - epsilon` gains nothing by falling further.
        epsilon_high: A ratio above `1 + epsilon_high` gains nothing by rising further.
        delta: Upper bound of the ratio where the advantage is negative (two-sided clipping, INTELLECT-2,
            https://arxiv.org/abs/2505.07291); None for no bound.
        importance_sampling_level: Whether each token has its own ratio, or all tokens of a sequence share the
            geometric mean of theirs (GSPO, https://arxiv.org/abs/2507.18071).
    """

    epsilon: float
    epsilon_high: float
    delta: float | None
    importance_sampling_level: ImportanceSamplingLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """What each token costs, before any weight.

    Attributes:
        token_loss: `[N]`, with gradient.
        ratio: `[N]`, policy / old before any clipping, with gradient.
        clipped_low: `[N]` bool, the ratio is below its lower bound and the advantage negative.
        clipped_high: `[N]` bool, the ratio is above its upper bound and the advantage positive.
    """

    token_loss: torch.Tensor
    ratio: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor


TokenWeights: TypeAlias = Callable[[npt.NDArray[np.int64], npt.NDArray[np.bool_]], npt.NDArray[np.float64]]
"""(how many tokens of each completion the policy wrote `[S]`, of the whole step, whether each sequence is in the loss
`[S]`) to the weight that each of these tokens has, `[S]`; 0 for a sequence that is not in the loss or has no token."""

TokenLossFunction: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, LossSettings], TokenLoss
]
"""(policy_logprobs `[N]`, old_logprobs `[N]`, advantages `[N]`, sequence_index `[N]`, S, settings) to the cost of each
token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One row of the table of losses.

    Attributes:
        token_weights: How the tokens of a step are averaged.
        token_loss: What is averaged.
    """

    token_weights: TokenWeights
    token_loss: TokenLossFunction
