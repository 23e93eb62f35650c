"""What the pool knows of each engine and of each sample on its way, and what it counts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from shoal.protocols import RolloutEngine
from shoal.rollout.health import Health, State
from shoal.rollout.watch import EngineWatch
from shoal.types import Rollout, RolloutRequest


@dataclass(slots=True, eq=False)
class Seat:
    """An engine with what the pool knows of it."""

    engine: RolloutEngine
    health: Health
    watch: EngineWatch
    done_samples: int = 0
    done_tokens: int = 0
    why_dead: str = ""

    @property
    def is_gone(self) -> bool:
        """Whether it has no process that could be asked."""
        return self.health.state in (State.DEAD, State.STARTING)


@dataclass(slots=True, eq=False)
class Ticket:
    """One sample on its way.

    Attributes:
        sample: Its name for the dispatcher.
        request: What is wanted.
        placed: Done once `engine` is set, or there is no hope that it will be.
        engine: Who writes it; None while it waits.
        attempt: The writing.
        parts: What engines have handed over unfinished, in order.
        target: Who is to go on once the present engine has handed over; None if it was not asked to.
        failures: What engines that live on said when they failed it.
        has_ended: Whether the dispatcher has forgotten it.
    """

    sample: int
    request: RolloutRequest
    placed: asyncio.Future[None]
    engine: int | None = None
    attempt: asyncio.Task[Rollout] | None = None
    parts: list[Rollout] = field(default_factory=list)
    target: int | None = None
    failures: list[str] = field(default_factory=list)
    has_ended: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What an engine is doing and has done.

    Attributes:
        name: Of the engine.
        state: Where it stands.
        running: Samples under way.
        done_samples: Samples finished since the start.
        done_tokens: Completion tokens of those.
    """

    name: str
    state: State
    running: int
    done_samples: int
    done_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCounts:
    """What has gone wrong since the pool was made.

    Attributes:
        engines_lost: How often an engine was given up.
        samples_reissued: How often a sample that an engine had begun was given to another.
    """

    engines_lost: int
    samples_reissued: int
