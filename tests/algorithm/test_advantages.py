"""Advantages: exact zeros, invariances, missing rewards, and agreement with a naive reference."""

from __future__ import annotations

import math
import statistics
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.algorithm.advantages import STD_EPSILON, FloatArray, ScaleRewards, compute_advantages
from shoal.errors import RewardError

NAN = math.nan
quick = settings(deadline=None, max_examples=60)
moderate_floats = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))
scales = st.sampled_from(get_args(ScaleRewards))


def groups(*rows: list[float]) -> FloatArray:
    """Rewards of one function, a row a group."""
    return np.array(rows, dtype=np.float64)[:, :, None]


@st.composite
def reward_arrays(draw: st.DrawFn, num_functions: int = 2, *, missing: bool = True) -> FloatArray:
    """Rewards `[P, K, F]`, some of them missing."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.just(num_functions)))
    values = st.one_of(moderate_floats, st.just(NAN)) if missing else moderate_floats
    size = math.prod(shape)
    return np.array(draw(st.lists(values, min_size=size, max_size=size)), dtype=np.float64).reshape(shape)


def naive(rewards: FloatArray, weights: FloatArray, scale: str) -> FloatArray:
    """GRPO's advantages with lists, loops and the statistics module."""
    totals = [
        [
            sum((w * r for w, r in zip(weights, cell, strict=True) if not math.isnan(r)), 0.0)
            if not all(map(math.isnan, cell))
            else NAN
            for cell in group
        ]
        for group in rewards.tolist()
    ]
    scorable = [r for group in totals for r in group if not math.isnan(r)]
    batch_std = statistics.stdev(scorable) if len(scorable) > 1 else 0.0
    out = []
    for group in totals:
        known = [r for r in group if not math.isnan(r)]
        mean = statistics.fmean(known) if known else 0.0
        group_std = statistics.stdev(known) if len(known) > 1 else 0.0
        divisor = {"group": group_std + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[scale]
        out.append([0.0 if math.isnan(r) else (r - mean) / divisor for r in group])
    return np.array(out)


@quick
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 9), scales)
def test_equal_rewards_give_exactly_zero(reward: float, num_completions: int, scale: ScaleRewards) -> None:
    result = compute_advantages(groups([reward] * num_completions), np.ones(1), scale_rewards=scale)
    assert (result.advantages == 0).all()
    assert (result.group_std == 0).all()
    assert result.zero_std.all()


def test_the_common_float32_formula_does_not_give_exactly_zero() -> None:
    rewards = np.full(7, 0.1, dtype=np.float32)
    common = (rewards - rewards.mean()) / (rewards.std(ddof=1) + np.float32(1e-4))
    assert (common != 0).any()  # the control: what the test above guards against does happen


@quick
@given(reward_arrays(), scales, st.lists(st.floats(-2, 2), min_size=2, max_size=2))
def test_advantages_agree_with_a_naive_reference(
    rewards: FloatArray, scale: ScaleRewards, weights: list[float]
) -> None:
    result = compute_advantages(rewards, np.array(weights), scale_rewards=scale)
    np.testing.assert_allclose(result.advantages, naive(rewards, np.array(weights), scale), rtol=1e-7, atol=1e-9)


@quick
@given(reward_arrays(1), scales, st.integers(-(10**6), 10**6))
def test_a_shift_of_all_rewards_changes_nothing(rewards: FloatArray, scale: ScaleRewards, shift: int) -> None:
    before = compute_advantages(rewards, np.ones(1), scale_rewards=scale)
    after = compute_advantages(rewards + shift, np.ones(1), scale_rewards=scale)
    # 1e-10 of rounding in rewards + shift, divided by no less than STD_EPSILON
    np.testing.assert_allclose(after.advantages, before.advantages, rtol=1e-5, atol=5e-6)


@quick
@given(reward_arrays(1), st.floats(0.01, 100))
def test_unscaled_advantages_scale_with_the_rewards(rewards: FloatArray, factor: float) -> None:
    before = compute_advantages(rewards, np.ones(1), scale_rewards="none").advantages
    after = compute_advantages(rewards * factor, np.ones(1), scale_rewards="none").advantages
    np.testing.assert_allclose(after, before * factor, rtol=1e-9, atol=1e-9)


@quick
@given(reward_arrays(1), st.floats(1, 50))
def test_group_scaled_advantages_do_not_depend_on_the_scale_of_the_rewards(rewards: FloatArray, factor: float) -> None:
    """Up to STD_EPSILON, whose relative share of the divisor is at most STD_EPSILON / std."""
    before = compute_advantages(rewards, np.ones(1))
    after = compute_advantages(rewards * factor, np.ones(1))
    wide = before.group_std > 1
    np.testing.assert_allclose(after.advantages[wide], before.advantages[wide], rtol=2 * STD_EPSILON, atol=1e-9)


@quick
@given(reward_arrays(), scales)
def test_advantages_of_a_group_sum_to_zero_and_order_as_the_rewards(rewards: FloatArray, scale: ScaleRewards) -> None:
    result = compute_advantages(rewards, np.array([1.0, 0.5]), scale_rewards=scale)
    assert np.isfinite(result.advantages).all()
    np.testing.assert_allclose(result.advantages.sum(axis=1), 0.0, atol=1e-7)
    for group, advantages in zip(result.rewards, result.advantages, strict=True):
        known = ~np.isnan(group)
        order = np.argsort(group[known], kind="stable")
        assert (np.diff(advantages[known][order]) >= -1e-12).all()


def test_a_known_group_has_the_known_advantages() -> None:
    result = compute_advantages(groups([0.0, 1.0, 1.0, 2.0]), np.ones(1))
    std = math.sqrt(2 / 3)
    np.testing.assert_allclose(result.advantages, [[-1 / (std + 1e-4), 0, 0, 1 / (std + 1e-4)]], rtol=1e-14)
    np.testing.assert_allclose(result.group_std, [std], rtol=1e-15)


def test_an_unscorable_completion_has_advantage_zero_and_leaves_the_others_as_without_it() -> None:
    with_it = compute_advantages(groups([1.0, NAN, 3.0, 8.0]), np.ones(1))
    without = compute_advantages(groups([1.0, 3.0, 8.0]), np.ones(1))
    assert with_it.advantages[0, 1] == 0
    assert math.isnan(with_it.rewards[0, 1])
    np.testing.assert_array_equal(np.delete(with_it.advantages, 1, axis=1), without.advantages)


def test_counting_an_unscorable_completion_as_zero_would_differ() -> None:
    missing = compute_advantages(groups([1.0, NAN, 3.0]), np.ones(1)).advantages
    as_zero = compute_advantages(groups([1.0, 0.0, 3.0]), np.ones(1)).advantages
    assert (missing != as_zero).all()  # the control of the test above


def test_a_function_without_an_answer_is_left_out_of_the_weighted_sum() -> None:
    rewards = np.array([[[1.0, 4.0], [NAN, 4.0], [2.0, NAN]]])
    result = compute_advantages(rewards, np.array([2.0, 0.5]))
    np.testing.assert_array_equal(result.rewards, [[4.0, 2.0, 4.0]])


def test_a_group_that_nobody_could_score_teaches_nothing() -> None:
    result = compute_advantages(groups([NAN, NAN], [0.0, 1.0]), np.ones(1), scale_rewards="batch")
    assert (result.advantages[0] == 0).all()
    assert result.zero_std.tolist() == [True, False]
    assert result.group_std[0] == 0


def test_batch_scaling_divides_all_groups_by_one_standard_deviation() -> None:
    rewards = groups([0.0, 2.0], [0.0, 20.0])
    result = compute_advantages(rewards, np.ones(1), scale_rewards="batch")
    std = statistics.stdev([0, 2, 0, 20]) + 1e-4
    np.testing.assert_allclose(result.advantages, np.array([[-1, 1], [-10, 10]]) / std, rtol=1e-14)


@quick
@given(reward_arrays(missing=False), st.floats(0.1, 50))
def test_normalize_then_sum_does_not_let_a_large_reward_drown_a_small_one(rewards: FloatArray, factor: float) -> None:
    """Scaling one function's rewards changes nothing but the share of STD_EPSILON."""
    spread = rewards.std(axis=1)
    rewards = rewards[(spread > 1).all(axis=1)]
    if rewards.shape[0] == 0:
        return
    scaled = rewards * np.array([1.0, factor])
    weights = np.array([1.0, 0.7])
    before = compute_advantages(rewards, weights, multi_objective_aggregation="normalize_then_sum")
    after = compute_advantages(scaled, weights, multi_objective_aggregation="normalize_then_sum")
    np.testing.assert_allclose(after.advantages, before.advantages, atol=0.05)


def test_normalize_then_sum_agrees_with_its_formula() -> None:
    rewards = np.array([[[0.0, 10.0], [1.0, 30.0]], [[2.0, 5.0], [2.0, 6.0]]])
    result = compute_advantages(rewards, np.array([1.0, 2.0]), multi_objective_aggregation="normalize_then_sum")
    half = math.sqrt(0.5)  # the sample std of two values is |a - b| / sqrt(2)
    first = 0.5 / (half + 1e-4) + 2 * 10 / (20 * half + 1e-4)
    second = 2 * 0.5 / (half + 1e-4)  # the first function tells these two apart not at all
    sums = [-first, first, -second, second]
    expected = np.array(sums).reshape(2, 2) / (statistics.stdev(sums) + 1e-4)
    np.testing.assert_allclose(result.advantages, expected, rtol=1e-12)


@quick
@given(reward_arrays(2))
def test_normalize_then_sum_gives_equal_groups_exactly_zero(rewards: FloatArray) -> None:
    rewards[0] = rewards[0, 0]
    result = compute_advantages(rewards, np.ones(2), multi_objective_aggregation="normalize_then_sum")
    assert (result.advantages[0] == 0).all()
    assert np.isfinite(result.advantages).all()


def test_an_infinite_reward_is_refused_by_name() -> None:
    with pytest.raises(RewardError, match="Reward function 0 gave inf to completion 1 of prompt 0"):
        compute_advantages(groups([0.0, math.inf]), np.ones(1))
