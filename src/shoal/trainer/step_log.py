"""Gather what happens during optimizer steps until it is logged, and add it up over ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch.distributed as dist

from shoal.algorithm.metrics import (
    ObjectiveMetrics,
    PackedMetrics,
    merge_metrics,
    named_metrics,
    pack_metrics,
    unpack_metrics,
)


class StepLog:
    """Numbers by name, averaged over the steps since they were last taken, as TRL logs them."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)
        self._objective: list[ObjectiveMetrics] = []

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add one step's numbers."""
        for name, value in metrics.items():
            self._values[name].append(value)

    def add_objective(self, metrics: ObjectiveMetrics) -> None:
        """Add one micro-batch's totals; they stay on its device until the step ends."""
        self._objective.append(metrics)

    def end_step(self, world_size: int) -> None:
        """Add up the step's micro-batches over all ranks. A collective."""
        if not self._objective:
            return
        packed = pack_metrics(merge_metrics(self._objective))
        self._objective.clear()
        self.add(named_metrics(unpack_metrics(_reduce(packed) if world_size > 1 else packed)))

    def take(self) -> dict[str, float | None]:
        """Return the averages and start anew. What was never a number is None, which JSON can hold."""
        averages: dict[str, float | None] = {}
        for name, values in self._values.items():
            known = [value for value in values if not math.isnan(value)]
            averages[name] = sum(known) / len(known) if known else None
        self._values.clear()
        return averages


def _reduce(packed: PackedMetrics) -> PackedMetrics:
    for tensor, operation in (
        (packed.sums, dist.ReduceOp.SUM),
        (packed.mins, dist.ReduceOp.MIN),
        (packed.maxs, dist.ReduceOp.MAX),
    ):
        dist.all_reduce(tensor, op=operation)
    return packed
