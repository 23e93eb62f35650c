"""Which engine writes the next sample."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.rollout.dispatch import choose_engine

loads_of_engines = st.lists(st.integers(0, 20), min_size=1, max_size=8)
margins = st.integers(0, 6)


@settings(deadline=None, max_examples=300)
@given(loads_of_engines, margins, st.data())
def test_the_choice_is_never_more_than_the_margin_above_the_least_loaded(
    loads: list[int], margin: int, data: st.DataObject
) -> None:
    preferred = data.draw(st.none() | st.integers(0, len(loads) - 1))
    assert loads[choose_engine(loads, preferred, margin)] <= min(loads) + margin


@settings(deadline=None, max_examples=300)
@given(loads_of_engines, margins, st.data())
def test_the_engine_that_has_the_prompt_is_chosen_exactly_while_it_is_within_the_margin(
    loads: list[int], margin: int, data: st.DataObject
) -> None:
    preferred = data.draw(st.integers(0, len(loads) - 1))
    within = loads[preferred] <= min(loads) + margin
    chosen = choose_engine(loads, preferred, margin)
    assert (chosen == preferred) if within else (loads[chosen] == min(loads))


@settings(deadline=None, max_examples=100)
@given(loads_of_engines, margins)
def test_a_first_sample_goes_to_the_first_of_the_least_loaded(loads: list[int], margin: int) -> None:
    assert choose_engine(loads, None, margin) == loads.index(min(loads))


def test_a_prompt_stays_at_home_up_to_the_margin_and_leaves_beyond_it() -> None:
    assert choose_engine([3, 1], preferred=0, margin=2) == 0
    assert choose_engine([4, 1], preferred=0, margin=2) == 1


def test_choosing_leaves_the_loads_alone() -> None:
    loads = [2, 1, 3]
    choose_engine(loads, 2, 1)
    assert loads == [2, 1, 3]
