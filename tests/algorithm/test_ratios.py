"""The four corrections between engine and trainer, against a loop."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.algorithm.ratios import CorrectionMode, rollout_correction, sequence_sums

logprob = st.floats(-8, 0)
bound = st.one_of(st.none(), st.floats(0.1, 4.0))


def naive(
    old: list[float], rollout: list[float], index: list[int], mode: str, low: float | None, high: float | None
) -> list[float]:
    """Each mode, token by token."""
    differences = [0.0 if math.isnan(r) else o - r for o, r in zip(old, rollout, strict=True)]
    ratios = []
    for n in range(len(old)):
        if mode.startswith("sequence"):
            log_ratio = sum(d for d, i in zip(differences, index, strict=True) if i == index[n])
        else:
            log_ratio = differences[n]
        ratio = math.exp(log_ratio)
        lower, upper = (-math.inf if low is None else low), (math.inf if high is None else high)
        if mode.endswith("mask"):
            ratios.append(ratio if lower <= ratio <= upper else 0.0)
        else:
            ratios.append(min(max(ratio, lower), upper))
    return ratios


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(logprob, st.one_of(logprob, st.just(math.nan)), st.integers(0, 3)), max_size=12),
    st.sampled_from(get_args(CorrectionMode)),
    bound,
    bound,
)
def test_every_mode_agrees_with_a_loop(
    tokens: list[tuple[float, float, int]], mode: CorrectionMode, low: float | None, high: float | None
) -> None:
    if low is not None and high is not None:
        low, high = min(low, high), max(low, high)
    old, rollout = [t[0] for t in tokens], [t[1] for t in tokens]
    index = sorted(t[2] for t in tokens)
    result = rollout_correction(
        torch.tensor(old, dtype=torch.float64),
        torch.tensor(rollout, dtype=torch.float64),
        torch.tensor(index, dtype=torch.long),
        4,
        mode=mode,
        clip_min=low,
        clip_max=high,
    )
    expected = torch.tensor(naive(old, rollout, index, mode, low, high), dtype=torch.float64)
    torch.testing.assert_close(result.ratio, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", get_args(CorrectionMode))
def test_equal_logprobs_give_exactly_one(mode: CorrectionMode) -> None:
    logprobs = -torch.rand(6)
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    result = rollout_correction(logprobs, logprobs, index, 2, mode=mode, clip_min=0.5, clip_max=2.0)
    assert result.ratio.tolist() == [1.0] * 6


def test_a_token_without_an_engine_logprob_counts_as_agreeing_and_is_reported_as_unknown() -> None:
    result = rollout_correction(
        torch.tensor([-1.0, -2.0]),
        torch.tensor([math.nan, -2.5]),
        torch.tensor([0, 0]),
        1,
        mode="sequence_truncate",
        clip_min=None,
        clip_max=None,
    )
    torch.testing.assert_close(result.ratio, torch.tensor([0.5, 0.5]).exp())
    assert torch.isnan(result.logprob_difference).tolist() == [True, False]


def test_the_ratio_is_float32_and_without_gradient_and_the_inputs_stay_as_they_were() -> None:
    old = torch.tensor([-1.0, -2.0], requires_grad=True)
    rollout = torch.tensor([-5.0, math.nan])
    kept = rollout.clone()
    result = rollout_correction(
        old, rollout, torch.tensor([0, 0]), 1, mode="token_truncate", clip_min=None, clip_max=3.0
    )
    assert result.ratio.dtype == torch.float32
    assert not result.ratio.requires_grad
    assert result.ratio.tolist() == [3.0, 1.0]
    torch.testing.assert_close(rollout, kept, rtol=0, atol=0, equal_nan=True)


def test_sequences_do_not_leak_into_each_other() -> None:
    old = torch.zeros(4)
    index = torch.tensor([0, 0, 1, 1])
    far = rollout_correction(
        old, torch.tensor([-9.0, 0, 0, 0]), index, 2, mode="sequence_mask", clip_min=None, clip_max=3.0
    )
    assert far.ratio.tolist() == [0.0, 0.0, 1.0, 1.0]


def test_sums_of_long_sequences_keep_digits_that_float32_sums_lose() -> None:
    values = torch.cat([torch.tensor([1e4]), torch.full((20_000,), 1e-4), torch.tensor([-1e4])])
    index = torch.zeros(len(values), dtype=torch.long)
    exact = values.double().sum().item()
    assert abs(sequence_sums(values, index, 1).item() - exact) < 1e-6
    assert abs(torch.zeros(1).index_add(0, index, values).item() - exact) > 1e-2  # the control


def test_sequence_sums_carry_the_gradient_of_each_sequence() -> None:
    values = torch.randn(5, dtype=torch.float64, requires_grad=True)
    (sequence_sums(values, torch.tensor([0, 2, 2, 0, 2]), 3) * torch.tensor([2.0, 5.0, 7.0])).sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.tolist() == [2, 7, 7, 2, 7]
