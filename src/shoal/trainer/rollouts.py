"""What rank 0 owns besides the model: the engines, the line to each for weights, and the pool that asks them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.engines.fleet import Fleet
from shoal.errors import EngineRequestError
from shoal.protocols import WeightSource
from shoal.rollout.collector import Decode, GroupRequest, RolloutCollector, Score
from shoal.rollout.loop_thread import LoopThread
from shoal.rollout.pool import EngineLoad, EnginePool
from shoal.types import PublishReport, ScoredGroup
from shoal.weights.link import EngineLink
from shoal.weights.publisher import WeightPublisher
from shoal.wire.rendezvous import GroupBackend

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """How the rollout side works.

    Attributes:
        backends: For each engine, what carries its weights.
        host: Address at which this process and the engines reach one another.
        max_in_flight: Samples under way on one engine at most.
        affinity_margin: See `shoal.rollout.dispatch`.
        weight_timeout_s: For each step of a publish.
    """

    backends: tuple[GroupBackend, ...]
    host: str
    max_in_flight: int
    affinity_margin: int
    weight_timeout_s: float


class Rollouts:
    """A running fleet that holds the trainer's weights and writes completions. Lives on trainer rank 0.

    Args:
        fleet: Started engines; ended by `close`.
        source: The trainer's weights.
        decode: Makes completions readable for rewards.
        score: Rewards a group.
        settings: How it works.
    """

    def __init__(
        self, fleet: Fleet, *, source: WeightSource, decode: Decode, score: Score, settings: RolloutSettings
    ) -> None:
        self.fleet = fleet
        self._loop = LoopThread("rollouts")
        self._pool = EnginePool(
            [engine.client for engine in fleet.engines],
            max_in_flight=settings.max_in_flight,
            affinity_margin=settings.affinity_margin,
        )
        self._collector = RolloutCollector(self._pool, decode=decode, score=score)
        self.publisher = WeightPublisher(
            source,
            [
                EngineLink(
                    engine.client,
                    num_workers=engine.spec.num_workers,
                    backend=backend,
                    host=settings.host,
                    timeout_s=settings.weight_timeout_s,
                )
                for engine, backend in zip(fleet.engines, settings.backends, strict=True)
            ],
            settings.weight_timeout_s,
        )
        self._is_connected = False
        self._is_closed = False
        self.version: int | None = None
        """Version that every engine was proven to hold; None before the first publish."""

    def publish(self, version: int) -> PublishReport:
        """Send the trainer's current weights to every engine, under this version.

        Raises:
            WeightSyncError: An engine failed, timed out, or holds something else.
            EngineError: An engine has ended.
        """
        self.fleet.check_alive()
        if not self._is_connected:
            self.publisher.connect()
            self._is_connected = True
            _log_reloaded(self.publisher)
        report = self.publisher.publish(version)
        self.version = version
        return report

    def collect(self, request: GroupRequest, *, timeout_s: float) -> tuple[ScoredGroup, ...]:
        """Have all groups written and rewarded.

        Raises:
            EngineError: An engine failed or has ended.
            RewardError: A reward function failed.
            TimeoutError: It took longer than `timeout_s`.
        """
        try:
            return self._loop.run(self._collector.collect(request), timeout_s=timeout_s, what="rollouts")
        except EngineRequestError:
            # A dead process explains a failed request better than the request does.
            self.fleet.check_alive()
            raise

    def loads(self) -> tuple[EngineLoad, ...]:
        """Return what each engine is doing."""
        return self._pool.loads()

    def log_paths(self) -> tuple[Path | None, ...]:
        """Return each engine's log file."""
        return tuple(engine.process.log_path for engine in self.fleet.engines)

    def close(self) -> None:
        """End the engines and everything else. Calling it again does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self.publisher.close()
        self._loop.run(self._close_clients(), timeout_s=10.0, what="connections to close")
        self._loop.close()
        self.fleet.close()

    async def _close_clients(self) -> None:
        await asyncio.gather(*(engine.client.aclose() for engine in self.fleet.engines), return_exceptions=True)


def _log_reloaded(publisher: WeightPublisher) -> None:
    for plan in publisher.plans:
        in_place = {piece.target for piece in plan.slices} - set(plan.reloaded)
        logger.info(
            "%s: %d slices, %d parameters written in place, %d through vLLM's reload%s",
            plan.worker,
            len(plan.slices),
            len(in_place),
            len(plan.reloaded),
            _examples(plan.reloaded),
        )


def _examples(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
