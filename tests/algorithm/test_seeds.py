"""Sample seeds: stable, in range, different."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.algorithm.seeds import sample_seed

number = st.integers(0, 2**40)


@settings(deadline=None)
@given(number, number, number, number)
def test_seeds_are_positive_int32_and_a_function_of_their_arguments(run: int, step: int, row: int, sample: int) -> None:
    seed = sample_seed(run, step, row, sample)
    assert 0 <= seed < 2**31
    assert seed == sample_seed(run, step, row, sample)


def test_seeds_are_the_same_in_every_version() -> None:
    """Changing these changes what a resumed run samples."""
    assert [sample_seed(0, 0, 0, 0), sample_seed(42, 7, 123, 5)] == [1242697157, 846421002]


def test_every_argument_changes_the_seed_and_none_can_stand_for_another() -> None:
    places = [
        (run, step, row, sample) for run in range(5) for step in range(5) for row in range(5) for sample in range(5)
    ]
    assert len({sample_seed(*place) for place in places}) == len(places)
