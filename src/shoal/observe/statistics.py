"""Means and paired differences with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shoal.errors import ShoalError

_Z_95 = NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """An estimate and the half width of its 95 % interval, in the same unit."""

    value: float
    half_width: float


def mean_interval(values: Sequence[float] | npt.NDArray[np.floating]) -> Interval:
    """Return the mean with its 95 % interval.

    The half width is `1.96 * s / sqrt(n)` with the sample standard deviation (n - 1). This is the normal approximation,
    a few percent too narrow below about 30 values. It is NaN for a single value, which says nothing about its spread.

    Args:
        values: `[n]` finite numbers, drawn independently of one another.

    Raises:
        ShoalError: There are none, or one is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ShoalError(f"A mean needs a flat list of at least one value, and got one of shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ShoalError(
            f"{int((~np.isfinite(array)).sum())} of {array.size} values are not finite, so they have no mean. Leave "
            "out those that do not apply before taking it."
        )
    half_width = _Z_95 * float(array.std(ddof=1)) / math.sqrt(array.size) if array.size > 1 else math.nan
    return Interval(value=float(array.mean()), half_width=half_width)


def paired_difference_interval(
    before: Sequence[float] | npt.NDArray[np.floating], after: Sequence[float] | npt.NDArray[np.floating]
) -> Interval:
    """Return the mean of `after - before` with its 95 % interval.

    Pairing removes what makes some items harder than others, so the interval is usually narrower than the two
    separate ones suggest. The approximation is that of `mean_interval`, on the differences.

    Args:
        before: `[n]` scores of the same items in the same order.
        after: `[n]`.

    Raises:
        ShoalError: The lengths differ, there are none, or one is not finite.
    """
    if len(before) != len(after):
        raise ShoalError(
            f"{len(before)} scores before and {len(after)} after cannot be paired. Judge the same items both times."
        )
    return mean_interval(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64))
