"""What rank 0 owns besides the model: the engines, and the pool that asks them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shoal.engines.fleet import Fleet
from shoal.errors import EngineRequestError
from shoal.rollout.collector import Decode, GroupRequest, RolloutCollector, Score
from shoal.rollout.loop_thread import LoopThread
from shoal.rollout.pool import EngineLoad, EnginePool, PoolSettings
from shoal.types import PublishReport, ScoredGroup
from shoal.weights.group import EngineAddress
from shoal.wire.transport import Backend

logger = logging.getLogger(__name__)

_TELL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """How the rollout side works.

    Attributes:
        backends: For each engine, what carries its weights.
        pool: How samples are spread, and when an engine is given up.
    """

    backends: tuple[Backend, ...]
    pool: PoolSettings


class Rollouts:
    """A running fleet that holds the trainer's weights and writes completions. Lives on trainer rank 0.

    Args:
        fleet: Started engines; ended by `close`.
        decode: Makes completions readable for rewards.
        score: Rewards a group.
        settings: How it works.
    """

    def __init__(self, fleet: Fleet, *, decode: Decode, score: Score, settings: RolloutSettings) -> None:
        self.fleet = fleet
        self._loop = LoopThread("rollouts")
        self._pool = EnginePool(
            [engine.client for engine in fleet.engines],
            settings.pool,
            why_ended=fleet.why_ended,
            on_lost=self._end_lost,
        )
        self._collector = RolloutCollector(self._pool, decode=decode, score=score)
        self.addresses = tuple(
            EngineAddress(client=engine.client, num_workers=engine.num_workers, backend=backend, host=engine.host)
            for engine, backend in zip(fleet.engines, settings.backends, strict=True)
        )
        """How weights reach each engine."""
        self._is_closed = False
        self.version: int | None = None
        """Version that every engine was proven to hold; None before the first publish."""

    @property
    def have_plugin(self) -> bool:
        """Whether the engines were started with Shoal's plugin; all were, or none."""
        return all(engine.process.has_plugin for engine in self.fleet.engines)

    def check_alive(self) -> None:
        """Look whether the engines that are in use still run.

        Raises:
            EngineError: One has ended.
        """
        self.fleet.check_alive()

    def publishing(self, version: int) -> None:
        """Ask nothing more of any engine before it is proven to hold the weights that are about to be sent."""
        self._in_loop(lambda: self._pool.publishing(version))

    def take(self, report: PublishReport) -> None:
        """Note what a publish has done; an engine that left its group is ended and asked nothing more."""
        self.version = report.version

        def tell() -> None:
            for name, reason in report.lost.items():
                self._pool.lost(name, reason)
            self._pool.proven(
                report.version, [engine.name for engine in self.fleet.engines if engine.name not in report.lost]
            )

        self._in_loop(tell)

    def collect(self, request: GroupRequest, *, timeout_s: float) -> tuple[ScoredGroup, ...]:
        """Have all groups written and rewarded.

        Raises:
            EngineError: No engine is left, or a request cannot be answered.
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
        self._loop.run(self._close_clients(), timeout_s=10.0, what="connections to close")
        self._loop.close()
        self.fleet.close()

    def _end_lost(self, name: str, reason: str) -> None:
        """End an engine that the pool has given up: what is left of it must not hold its devices and its port."""
        logger.error("%s is ended, the run goes on with the other engines: %s", name, reason)
        self.fleet.end(name)

    def _in_loop(self, act: Callable[[], None]) -> None:
        """Do something to the pool, which belongs to the loop's thread."""

        async def run() -> None:
            act()

        self._loop.run(run(), timeout_s=_TELL_TIMEOUT_S, what="the pool of engines to take note")

    async def _close_clients(self) -> None:
        await asyncio.gather(*(engine.client.aclose() for engine in self.fleet.engines), return_exceptions=True)
