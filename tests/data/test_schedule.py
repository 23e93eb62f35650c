"""The prompt schedule: every row once an epoch, and the same after a resume."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shoal.data.schedule import PromptSchedule
from shoal.errors import ConfigError

quick = settings(deadline=None, max_examples=60)


@st.composite
def schedules(draw: st.DrawFn) -> PromptSchedule:
    """Schedules that can exist."""
    num_prompts = draw(st.integers(1, 40))
    return PromptSchedule(
        num_prompts=num_prompts,
        prompts_per_batch=draw(st.integers(1, num_prompts)),
        seed=draw(st.integers(0, 2**32)),
        shuffle=draw(st.booleans()),
    )


@quick
@given(schedules(), st.integers(0, 5))
def test_an_epoch_takes_no_row_twice_and_drops_less_than_a_batch(schedule: PromptSchedule, epoch: int) -> None:
    first = epoch * schedule.batches_per_epoch
    steps = [schedule.rows(step) for step in range(first, first + schedule.batches_per_epoch)]
    rows = [row for step in steps for row in step]
    assert all(len(step) == schedule.prompts_per_batch for step in steps)
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(schedule.num_prompts))
    assert schedule.num_prompts - len(rows) < schedule.prompts_per_batch


@quick
@given(schedules(), st.integers(0, 200))
def test_a_resumed_run_takes_the_same_rows_as_one_that_never_stopped(schedule: PromptSchedule, step: int) -> None:
    uninterrupted = [schedule.rows(s) for s in range(step + 3)]
    resumed = PromptSchedule(
        num_prompts=schedule.num_prompts,
        prompts_per_batch=schedule.prompts_per_batch,
        seed=schedule.seed,
        shuffle=schedule.shuffle,
    )
    assert [resumed.rows(s) for s in range(step, step + 3)] == uninterrupted[step:]


def test_each_epoch_and_each_seed_has_its_own_order() -> None:
    def epoch(seed: int, number: int) -> tuple[int, ...]:
        return PromptSchedule(num_prompts=50, prompts_per_batch=50, seed=seed, shuffle=True).rows(number)

    assert len({epoch(0, 0), epoch(0, 1), epoch(1, 0), epoch(1, 1)}) == 4


def test_the_order_is_the_same_in_every_version() -> None:
    """Changing this changes what a resumed run trains on."""
    schedule = PromptSchedule(num_prompts=10, prompts_per_batch=4, seed=42, shuffle=True)
    assert [schedule.rows(step) for step in range(3)] == [(4, 8, 1, 9), (3, 6, 0, 7), (1, 2, 8, 5)]


def test_without_shuffling_the_order_is_the_datasets() -> None:
    schedule = PromptSchedule(num_prompts=5, prompts_per_batch=2, seed=0, shuffle=False)
    assert [schedule.rows(step) for step in range(4)] == [(0, 1), (2, 3), (0, 1), (2, 3)]


@quick
@given(st.integers(0, 20), st.integers(1, 30))
def test_a_batch_larger_than_the_dataset_is_refused(num_prompts: int, prompts_per_batch: int) -> None:
    assume(prompts_per_batch > num_prompts)
    with pytest.raises(ConfigError, match=f"takes {prompts_per_batch} different prompts.*has only {num_prompts}"):
        PromptSchedule(num_prompts=num_prompts, prompts_per_batch=prompts_per_batch, seed=0, shuffle=True)


@pytest.mark.parametrize(("prompts_per_batch", "seed", "what"), [(0, 0, "0 prompts"), (1, -1, "seed=-1")])
def test_a_schedule_without_sense_is_refused(prompts_per_batch: int, seed: int, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        PromptSchedule(num_prompts=3, prompts_per_batch=prompts_per_batch, seed=seed, shuffle=True)
