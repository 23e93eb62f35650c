"""Turn rewards into advantages: how much better each completion is than the others of its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from shoal.errors import RewardError

FloatArray: TypeAlias = npt.NDArray[np.float64]
ScaleRewards: TypeAlias = Literal["group", "batch", "none"]
MultiObjectiveAggregation: TypeAlias = Literal["sum_then_normalize", "normalize_then_sum"]

STD_EPSILON = 1e-4
"""What is added to a standard deviation before dividing by it; TRL's value, so that runs compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """The advantages of a step, with what its logs need.

    Attributes:
        advantages: `[P, K]` float64; exactly 0 for unscorable completions and for groups without any difference.
        rewards: `[P, K]` float64, the weighted sum over reward functions; NaN where every function gave `None`.
        group_std: `[P]` float64, sample standard deviation of each group's scorable rewards; 0 for fewer than two.
        zero_std: `[P]` bool, whether a group teaches nothing: its scorable completions are all equally good.
    """

    advantages: FloatArray
    rewards: FloatArray
    group_std: FloatArray
    zero_std: npt.NDArray[np.bool_]


def compute_advantages(
    rewards: FloatArray,
    weights: FloatArray,
    *,
    scale_rewards: ScaleRewards = "group",
    multi_objective_aggregation: MultiObjectiveAggregation = "sum_then_normalize",
) -> Advantages:
    """Compare every completion with the other completions of its prompt.

    `"sum_then_normalize"` is GRPO (https://arxiv.org/abs/2402.03300, section 4.1): the weighted sum of the rewards,
    minus its group's mean, over a standard deviation. `"normalize_then_sum"` is GDPO (https://arxiv.org/abs/2601.05242):
    each function's rewards are normalised within the group, summed, and normalised over the batch; `scale_rewards`
    has no part in it.

    Args:
        rewards: `[P, K, F]` float64; NaN where a reward function gave `None`.
        weights: `[F]` float64, the weight of each reward function.
        scale_rewards: What the difference from the group's mean is divided by: its group's standard deviation,
            that of all rewards of the step, or nothing (Dr. GRPO, https://arxiv.org/abs/2503.20783).
        multi_objective_aggregation: Whether rewards are summed before they are normalised, or after.

    Raises:
        RewardError: A reward is infinite, so that no mean exists.
    """
    _refuse_infinite(rewards)
    totals = _weighted_sum(rewards, weights)
    if multi_objective_aggregation == "sum_then_normalize":
        compared = totals
        advantages = _centred(totals, axis=1)
        if scale_rewards == "group":
            advantages = advantages / (_sample_std(totals, axis=1) + STD_EPSILON)
        elif scale_rewards == "batch":
            advantages = advantages / (_sample_std(totals, axis=None) + STD_EPSILON)
    else:
        normalised = _centred(rewards, axis=1) / (_sample_std(rewards, axis=1) + STD_EPSILON)
        compared = _weighted_sum(normalised, weights)
        advantages = _centred(compared, axis=None) / (_sample_std(compared, axis=None) + STD_EPSILON)

    # max == min, not std == 0: a mean is rounded, so the std of equal rewards need not come out as 0. A group in
    # which nothing could be scored has no max and counts as one without differences.
    zero_std = ~(np.fmax.reduce(compared, axis=1) > np.fmin.reduce(compared, axis=1))
    advantages = np.where(zero_std[:, None] | np.isnan(compared), 0.0, advantages)
    return Advantages(
        advantages=advantages,
        rewards=totals,
        group_std=_sample_std(totals, axis=1)[:, 0],
        zero_std=zero_std,
    )


def _refuse_infinite(rewards: FloatArray) -> None:
    """Raise for the first infinite reward, naming where it is."""
    infinite = np.argwhere(np.isinf(rewards))
    if len(infinite):
        prompt, completion, function = (int(i) for i in infinite[0])
        raise RewardError(
            f"Reward function {function} gave {rewards[prompt, completion, function]} to completion {completion} of "
            f"prompt {prompt} of this step. Its group then has no mean, so no advantage can be computed. "
            "Return a finite number, or None where the completion cannot be scored."
        )


def _weighted_sum(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Sum `[P, K, F]` over F where not NaN; NaN where all of F is."""
    return np.where(np.isnan(values).all(axis=2), np.nan, np.nansum(values * weights, axis=2))


def _centred(values: FloatArray, *, axis: int | None) -> FloatArray:
    """Subtract the mean over what is not NaN; exactly 0 everywhere when all values are equal.

    The minimum goes first: it is subtracted without a rounded mean, so equal values are exactly 0 before any mean is
    taken, and a large offset common to all values costs no precision.
    """
    above_min = values - np.fmin.reduce(values, axis=axis, keepdims=True)
    count = np.maximum(np.sum(~np.isnan(values), axis=axis, keepdims=True), 1)
    return np.asarray(above_min - np.nansum(above_min, axis=axis, keepdims=True) / count, dtype=np.float64)


def _sample_std(values: FloatArray, *, axis: int | None) -> FloatArray:
    """Give the standard deviation (n - 1) over what is not NaN, the reduced axis kept; 0 for fewer than two values."""
    count = np.sum(~np.isnan(values), axis=axis, keepdims=True)
    squares = np.nansum(_centred(values, axis=axis) ** 2, axis=axis, keepdims=True)
    return np.asarray(np.sqrt(squares / np.maximum(count - 1, 1)), dtype=np.float64)
