"""Every state with every event, and what holds whatever happens in whatever order."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.rollout.health import Event, Health, State, after

STARTING, STALE, READY, PAUSED, SUSPECT, ASLEEP, DEAD = (Health(state) for state in State)
SERVES = Health(State.READY, is_current=True)
DOUBTED = Health(State.SUSPECT, is_current=True)

# For each event: what becomes of an engine that is starting, stale, ready, paused, suspect (current or not), asleep,
# dead.
BEFORE = (STARTING, STALE, SERVES, PAUSED, DOUBTED, SUSPECT, ASLEEP, DEAD)
TABLE = {
    Event.STARTED: (STALE, STALE, SERVES, PAUSED, DOUBTED, SUSPECT, ASLEEP, DEAD),
    Event.PROVEN: (STARTING, SERVES, SERVES, SERVES, SERVES, SERVES, SERVES, DEAD),
    Event.OUTDATED: (STARTING, STALE, STALE, STALE, SUSPECT, SUSPECT, ASLEEP, DEAD),
    Event.PAUSED: (STARTING, STALE, PAUSED, PAUSED, SUSPECT, SUSPECT, ASLEEP, DEAD),
    Event.SLEPT: (STARTING, ASLEEP, ASLEEP, ASLEEP, ASLEEP, ASLEEP, ASLEEP, DEAD),
    Event.FAILED: (STARTING, SUSPECT, DOUBTED, SUSPECT, DOUBTED, SUSPECT, SUSPECT, DEAD),
    Event.ANSWERED: (STARTING, STALE, SERVES, PAUSED, SERVES, STALE, ASLEEP, DEAD),
    Event.DIED: (DEAD, DEAD, DEAD, DEAD, DEAD, DEAD, DEAD, DEAD),
    Event.RESTARTED: (STARTING, STALE, SERVES, PAUSED, DOUBTED, SUSPECT, ASLEEP, STARTING),
}


def test_the_table_is_complete() -> None:
    assert set(TABLE) == set(Event)
    assert {health.state for health in BEFORE} == set(State)


@pytest.mark.parametrize(
    ("health", "event", "expected"),
    [
        pytest.param(health, event, expected, id=f"{event.name}-{health.state.name}-{health.is_current}")
        for event, row in TABLE.items()
        for health, expected in zip(BEFORE, row, strict=True)
    ],
)
def test_every_event_in_every_state(health: Health, event: Event, expected: Health) -> None:
    assert after(health, event) == expected


def test_no_other_health_can_be_reached() -> None:
    reached = {STALE}
    while new := {after(health, event) for health, event in itertools.product(reached, Event)} - reached:
        reached |= new
    assert reached == set(BEFORE)


@given(st.lists(st.sampled_from(list(Event)), max_size=30))
def test_an_engine_is_ready_only_if_a_proof_came_after_all_that_makes_one_void(events: list[Event]) -> None:
    health = STALE
    for event in events:
        health = after(health, event)
    voids = [i for i, event in enumerate(events) if event in (Event.OUTDATED, Event.PAUSED, Event.SLEPT, Event.DIED)]
    since = events[voids[-1] + 1 :] if voids else events
    if health.state is State.READY:
        assert Event.PROVEN in since


@given(st.lists(st.sampled_from(list(Event)), max_size=30))
def test_the_dead_stay_dead_until_they_are_restarted(events: list[Event]) -> None:
    health = DEAD
    for event in events:
        health = after(health, event)
    assert (health.state is State.DEAD) or Event.RESTARTED in events
