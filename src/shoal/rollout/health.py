"""What state an engine is in, as a pure state machine: it knows no clock, no engine and no weights, only events.

Only a `READY` engine is given samples, and only a proof of the current weights makes an engine `READY`; one that was
merely silent for a while returns to what it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class State(Enum):
    """Where an engine stands."""

    STARTING = auto()
    """Its process is on its way up."""
    STALE = auto()
    """It answers, and holds nothing that was proven, or weights that are no longer current."""
    READY = auto()
    """It was proven to hold the current weights and is given samples."""
    PAUSED = auto()
    """It was ready, and new weights are on their way to it; what it was writing is kept."""
    SUSPECT = auto()
    """It failed a request or does not answer; it is given nothing until it does."""
    ASLEEP = auto()
    """It has given its memory back and holds nothing; it is given nothing, and not asked how it is."""
    DEAD = auto()
    """It has ended or was given up. What it was writing is written by others."""


class Event(Enum):
    """What happens to an engine."""

    STARTED = auto()
    """Its server answers for the first time."""
    PROVEN = auto()
    """It was proven to hold the current weights, and goes on."""
    OUTDATED = auto()
    """What it holds is not the current weights, or not any more."""
    PAUSED = auto()
    """New weights are about to be sent to it."""
    SLEPT = auto()
    """It has given its memory back until it is sent weights again."""
    FAILED = auto()
    """It failed a request, or did not answer in time."""
    ANSWERED = auto()
    """It answered as it should."""
    DIED = auto()
    """Its process has ended, or it was given up."""
    RESTARTED = auto()
    """A new process takes its place."""


@dataclass(frozen=True, slots=True)
class Health:
    """State of one engine.

    Attributes:
        state: Where it stands.
        is_current: Whether it holds the current weights, proven, for all that is known.
    """

    state: State
    is_current: bool = False


def after(health: Health, event: Event) -> Health:
    """Return the health that follows. Every event is allowed in every state, since news may come late."""
    state = health.state
    if event is Event.RESTARTED:
        return Health(State.STARTING) if state is State.DEAD else health
    if state is State.DEAD or event is Event.DIED:
        return Health(State.DEAD)
    if event is Event.PROVEN:
        # Of one that is starting, that is late news of the process before it.
        return health if state is State.STARTING else Health(State.READY, is_current=True)
    if event is Event.OUTDATED:
        return Health(State.STALE if state in (State.READY, State.PAUSED) else state)
    if event is Event.SLEPT:
        return health if state is State.STARTING else Health(State.ASLEEP)
    if event is Event.PAUSED:
        return Health(State.PAUSED if state is State.READY else state)
    if event is Event.STARTED:
        return Health(State.STALE) if state is State.STARTING else health
    if event is Event.FAILED:
        # A start has a time-out of its own.
        return health if state is State.STARTING else Health(State.SUSPECT, health.is_current)
    assert event is Event.ANSWERED
    if state is not State.SUSPECT:
        return health
    return Health(State.READY, is_current=True) if health.is_current else Health(State.STALE)
