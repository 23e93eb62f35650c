"""Means and their intervals, against values worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ShoalError
from shoal.observe.statistics import mean_interval, paired_difference_interval


def test_the_interval_of_a_known_sample() -> None:
    # s = sqrt((2.25 + 0.25 + 0.25 + 2.25) / 3) = 1.2909944, and 1.9599640 * s / sqrt(4) = 1.2651513.
    value, half_width = mean_interval([1, 2, 3, 4])
    assert value == 2.5
    assert half_width == pytest.approx(1.2651513, abs=1e-7)


def test_pairing_removes_the_spread_between_items() -> None:
    before = [0.0, 10.0, 20.0]
    value, half_width = paired_difference_interval(before, [1.0, 11.0, 21.0])
    assert (value, half_width) == (1.0, 0.0)
    assert mean_interval(before).half_width > 11  # the control: unpaired, the spread is there


def test_the_paired_interval_of_a_known_sample() -> None:
    # Differences 1, 0, 1, -1: mean 1/4, s = sqrt(11/12), 1.9599640 * s / 2 = 0.9382613.
    value, half_width = paired_difference_interval([0, 1, 0, 1], [1, 1, 1, 0])
    assert value == 0.25
    assert half_width == pytest.approx(0.9382613, abs=1e-7)


def test_a_single_value_has_no_known_spread() -> None:
    value, half_width = mean_interval([3.0])
    assert value == 3.0
    assert math.isnan(half_width)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.floats(-100, 100))
def test_a_shift_moves_the_mean_and_not_the_width(values: list[float], shift: float) -> None:
    before, after = mean_interval(values), mean_interval(np.array(values) + shift)
    assert after.value == pytest.approx(before.value + shift, abs=1e-9)
    assert after.half_width == pytest.approx(before.half_width, abs=1e-9)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")], [[1.0, 2.0]]])
def test_what_has_no_mean_is_refused(values: list[float]) -> None:
    with pytest.raises(ShoalError):
        mean_interval(values)


def test_unequal_lengths_cannot_be_paired() -> None:
    with pytest.raises(ShoalError, match="2 scores before and 1 after"):
        paired_difference_interval([1, 2], [1])
