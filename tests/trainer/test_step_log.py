"""Logged numbers are averages over steps; a step's own are exact sums over micro-batches, whatever the split."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.algorithm.metrics import ObjectiveMetrics
from shoal.trainer.step_log import StepLog

numbers = st.floats(-1e6, 1e6)


def metrics(**known: float) -> ObjectiveMetrics:
    """One micro-batch's totals: nothing measured but what is given."""
    nothing = {field.name: 0.0 for field in fields(ObjectiveMetrics)}
    nothing |= {"ratio_min": math.inf, "ratio_max": -math.inf, "logprob_difference_max": -math.inf}
    return ObjectiveMetrics(
        **{name: torch.tensor(value, dtype=torch.float64) for name, value in (nothing | known).items()}
    )


@given(st.lists(st.fixed_dictionaries({}, optional={"a": numbers, "b": numbers | st.just(math.nan)}), max_size=8))
def test_each_name_is_averaged_over_the_steps_that_had_a_number_for_it(added: list[dict[str, float]]) -> None:
    log = StepLog()
    for step in added:
        log.add(step)
    expected: dict[str, float | None] = {}
    for name in ("a", "b"):
        values = [step[name] for step in added if name in step]
        known = [value for value in values if not math.isnan(value)]
        if values:
            expected[name] = pytest.approx(sum(known) / len(known), abs=1e-9) if known else None
    assert log.take() == expected


def test_taking_begins_anew() -> None:
    log = StepLog()
    log.add({"reward": 1.0})
    assert log.take() == {"reward": 1.0}
    assert log.take() == {}
    log.add({"reward": 3.0})
    assert log.take() == {"reward": 3.0}


def test_a_steps_micro_batches_are_added_up_and_not_averaged() -> None:
    log = StepLog()
    log.add_objective(
        metrics(entropy_sum=1.0, num_entropies=1.0, ratio_sum=0.5, ratio_min=0.5, ratio_max=0.5, num_ratios=1.0)
    )
    log.add_objective(
        metrics(entropy_sum=9.0, num_entropies=4.0, ratio_sum=6.0, ratio_min=1.0, ratio_max=2.0, num_ratios=4.0)
    )
    log.end_step(world_size=1)
    taken = log.take()
    assert taken["entropy"] == 2.0  # The mean of means would be 1.625.
    assert taken["sampling/importance_sampling_ratio/mean"] == 1.3
    assert taken["sampling/importance_sampling_ratio/min"] == 0.5
    assert taken["sampling/importance_sampling_ratio/max"] == 2.0
    assert "kl" not in taken


def test_steps_are_averaged_with_equal_weight() -> None:
    log = StepLog()
    for entropy, tokens in ((2.0, 1.0), (30.0, 10.0)):
        log.add_objective(metrics(entropy_sum=entropy, num_entropies=tokens))
        log.end_step(world_size=1)
    assert log.take()["entropy"] == (2.0 + 3.0) / 2


def test_a_step_without_micro_batches_adds_nothing() -> None:
    log = StepLog()
    log.end_step(world_size=1)
    assert log.take() == {}
    log.add_objective(metrics(entropy_sum=1.0, num_entropies=1.0))
    log.end_step(world_size=1)
    log.end_step(world_size=1)
    assert log.take()["entropy"] == 1.0
