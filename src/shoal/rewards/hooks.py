"""The `log_extra` and `log_metric` that reward functions are given: one collector per scored group."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shoal.errors import RewardError
from shoal.rewards.answers import as_number, shown


class GroupLog:
    """Collects what the reward functions of one group log; safe to use from several threads."""

    def __init__(self, *, num_completions: int) -> None:
        """Start with nothing logged, for a group of `num_completions` completions."""
        self._num_completions = num_completions
        self._lock = threading.Lock()
        self._extras: dict[str, tuple[Any, ...]] = {}
        self._logged_by: dict[str, str] = {}
        self._metrics: list[tuple[str, float]] = []

    def extras(self) -> dict[str, tuple[Any, ...]]:
        """Return the columns logged so far, each of length K."""
        with self._lock:
            return dict(self._extras)

    def metrics(self) -> tuple[tuple[str, float], ...]:
        """Return the metrics logged so far, in the order of the calls; a name may occur several times."""
        with self._lock:
            return tuple(self._metrics)

    def add_extra(self, column: str, values: Sequence[Any], *, name: str, who: str) -> None:
        """Add a column to the table of completions; a function that logs its column twice replaces it.

        Args:
            column: The column's name.
            values: One value per completion.
            name: The reward function that logs.
            who: The function and the dataset row, as messages are to name them.

        Raises:
            RewardError: There is not one value per completion, or another function logged the same column.
        """
        if isinstance(values, (torch.Tensor, np.ndarray)):
            values = values.tolist()
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
            raise RewardError(
                f"{who} called log_extra({column!r}, {shown(values)}), which is not a list. Pass one value per "
                "completion, in the order of `completions`."
            )
        if len(values) != self._num_completions:
            raise RewardError(
                f"{who} called log_extra({column!r}, …) with {len(values)} values for {self._num_completions} "
                "completions. The column is shown next to the completions, so there must be exactly one value for each."
            )
        with self._lock:
            owner = self._logged_by.setdefault(column, name)
            if owner != name:
                raise RewardError(
                    f"{who} logged the column {column!r}, which reward function {owner!r} logs too; one would "
                    "overwrite the other. Give the columns different names."
                )
            self._extras[column] = tuple(values)

    def add_metric(self, metric: str, value: object, *, who: str) -> None:
        """Add a scalar metric.

        Raises:
            RewardError: The value is not a number.
        """
        number = as_number(value)
        if number is None:
            raise RewardError(
                f"{who} called log_metric({metric!r}, {shown(value)}) with a {type(value).__name__}, which cannot be "
                "averaged over a step. Pass one number."
            )
        with self._lock:
            self._metrics.append((metric, number))
