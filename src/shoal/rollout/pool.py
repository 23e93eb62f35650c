"""Several engines as one: each sample goes to the engine that can take it soonest."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.protocols import RolloutEngine
from shoal.rollout.dispatch import choose_engine
from shoal.rollout.tasks import gather_or_cancel
from shoal.types import Rollout, RolloutRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What an engine is doing and has done.

    Attributes:
        name: Of the engine.
        running: Samples under way.
        done_samples: Samples finished since the start.
        done_tokens: Completion tokens of those.
    """

    name: str
    running: int
    done_samples: int
    done_tokens: int


class EnginePool:
    """Dispatches samples over engines. Its coroutines belong to one event loop; `loads` may be called from anywhere.

    Args:
        engines: At least one.
        max_in_flight: Samples that one engine may have under way. The rest wait here, where they can still go to
            whichever engine is free first.
        affinity_margin: See `choose_engine`.
    """

    def __init__(self, engines: Sequence[RolloutEngine], *, max_in_flight: int, affinity_margin: int) -> None:
        assert engines, "a pool needs an engine"
        self._engines = tuple(engines)
        self._max_in_flight = max_in_flight
        self._margin = affinity_margin
        self._running = [0] * len(self._engines)
        self._done_samples = [0] * len(self._engines)
        self._done_tokens = [0] * len(self._engines)
        self._freed = asyncio.Condition()

    async def generate_group(self, requests: Sequence[RolloutRequest]) -> tuple[Rollout, ...]:
        """Write all samples of one prompt, together on one engine while that is no worse.

        Raises:
            EngineRequestError: An engine failed. The group's other samples are cancelled.
        """
        home: list[int | None] = [None]
        return await gather_or_cancel(self._generate(request, home) for request in requests)

    def loads(self) -> tuple[EngineLoad, ...]:
        """Return each engine's load."""
        return tuple(
            EngineLoad(
                name=engine.name,
                running=self._running[index],
                done_samples=self._done_samples[index],
                done_tokens=self._done_tokens[index],
            )
            for index, engine in enumerate(self._engines)
        )

    async def _generate(self, request: RolloutRequest, home: list[int | None]) -> Rollout:
        async with self._freed:
            await self._freed.wait_for(lambda: min(self._running) < self._max_in_flight)
            loads = self._running
            index = choose_engine(loads, home[0], self._margin)
            if loads[index] >= self._max_in_flight:
                index = choose_engine(loads, None, self._margin)
            home[0] = index
            self._running[index] += 1
        try:
            rollout = await self._engines[index].generate(request)
        finally:
            self._running[index] -= 1  # at once: a second cancellation may interrupt the wait for the lock
            async with self._freed:
                self._freed.notify_all()
        self._done_samples[index] += 1
        self._done_tokens[index] += len(rollout.token_ids)
        return rollout
