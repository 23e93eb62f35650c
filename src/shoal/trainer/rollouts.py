"""What rank 0 owns besides the model: the engines, and the pool that asks them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.engines.fleet import Fleet
from shoal.engines.restarts import Restarts, RestartSettings
from shoal.errors import EngineRequestError, NoEngineError
from shoal.rollout.collector import Decode, GroupRequest, RolloutCollector, Score
from shoal.rollout.health import State
from shoal.rollout.loop_thread import LoopThread
from shoal.rollout.pool import EnginePool, PoolSettings
from shoal.rollout.seats import EngineLoad
from shoal.types import PublishReport, ScoredGroup
from shoal.weights.group import EngineAddress
from shoal.weights.sleep import SleepReport
from shoal.wire.transport import Backend

logger = logging.getLogger(__name__)

_TELL_TIMEOUT_S = 30.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """How the rollout side works.

    Attributes:
        backends: For each engine, what carries its weights.
        pool: How samples are spread, and when an engine is given up.
        restarts: How engines that were given up are brought back.
    """

    backends: tuple[Backend, ...]
    pool: PoolSettings
    restarts: RestartSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RollCall:
    """Which engines a publish is for.

    Attributes:
        gone: Those that are not there, whether they come back or not.
        back: Those that have come back, and have to be met.
        is_one_there: Whether any is there.
    """

    gone: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    is_one_there: bool = True


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
        self._restarts = Restarts(fleet, settings.restarts, on_given_up=self._give_up)
        self._clients = {engine.name: engine.client for engine in fleet.engines}
        self._away: set[str] = set()
        self._collector = RolloutCollector(self._pool, decode=decode, score=score)
        self._backends = dict(zip(self._clients, settings.backends, strict=True))
        self._counted = (0, 0, 0)
        self._is_closed = False
        self.version: int | None = None
        """Version that every engine was proven to hold; None before the first publish."""

    @property
    def addresses(self) -> tuple[EngineAddress, ...]:
        """How weights reach each engine."""
        return tuple(self.address(engine.name) for engine in self.fleet.engines)

    def address(self, name: str) -> EngineAddress:
        """Return how weights reach one engine."""
        engine = next(engine for engine in self.fleet.engines if engine.name == name)
        return EngineAddress(
            client=engine.client,
            num_workers=engine.num_workers,
            backend=self._backends[engine.name],
            sleeps=engine.sleeps,
            host=engine.host,
        )

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
        """Note what a publish to all engines has done; those that have left are ended and asked nothing more."""
        self.version = report.version
        self.lost(report.lost)
        self._serve(report.version, [name for name in self._clients if name not in report.lost])

    def refilled(self, name: str, version: int) -> None:
        """Note that an engine that has come back was proven to hold this version; it writes again."""
        self._serve(version, [name])

    def lost(self, reasons: Mapping[str, str]) -> None:
        """Have engines ended and, while they have attempts left, restarted.

        Args:
            reasons: Why, by name.
        """

        def tell() -> None:
            for name, reason in reasons.items():
                self._pool.lost(name, reason)

        if reasons:
            self._in_loop(tell)

    def asleep(self, report: SleepReport) -> None:
        """Note which engines sleep; they hold nothing until the next publish. Those that could not are ended."""
        self.version = None
        self.lost(report.lost)
        self._in_loop(lambda: self._pool.asleep(report.asleep))

    def take_back(self) -> tuple[str, ...]:
        """Return the engines that have been restarted since the last call: they answer, and hold nothing yet."""
        ready = self._restarts.take_ready()

        async def swap() -> None:
            for engine in ready:
                former, self._clients[engine.name] = self._clients[engine.name], engine.client
                self._pool.started(engine.name, engine.client)
                await former.aclose()

        if ready:
            self._loop.run(swap(), timeout_s=_TELL_TIMEOUT_S, what="the pool of engines to take engines back")
        return tuple(engine.name for engine in ready)

    def roll_call(self, *, patience_s: float) -> RollCall:
        """Say which engines are there for a publish; wait a while for one if all are still on their way back.

        Raises:
            NoEngineError: None is there, and none is on its way.
        """
        self.lost({name: why for name in self._clients if (why := self.fleet.why_ended(name)) is not None})
        deadline = time.monotonic() + patience_s
        while True:
            back = self.take_back()
            gone = tuple(load.name for load in self.loads() if load.state in (State.STARTING, State.DEAD))
            is_one_there = len(gone) < len(self._clients)
            if is_one_there or time.monotonic() >= deadline:
                return RollCall(gone=gone, back=back, is_one_there=is_one_there)
            if (reason := self._pool.why_hopeless()) is not None:
                raise NoEngineError(reason)
            time.sleep(_POLL_S)

    def take_counts(self) -> dict[str, float]:
        """Return what has gone wrong since the last call, as metrics."""
        counts = self._pool.counts()
        now = (counts.engines_lost, self._restarts.num_restarted, counts.samples_reissued)
        before, self._counted = self._counted, now
        names = ("engines_lost", "engines_restarted", "samples_reissued")
        return {f"rollout/{name}": float(b - a) for name, a, b in zip(names, before, now, strict=True)}

    def collect(
        self, request: GroupRequest, *, timeout_s: float, meanwhile: Callable[[], None] | None = None
    ) -> tuple[ScoredGroup, ...]:
        """Have all groups written and rewarded.

        Args:
            request: What to collect.
            timeout_s: How long it may take.
            meanwhile: Called on this thread several times a second, to see to engines that have come back.

        Raises:
            NoEngineError: No engine is left.
            EngineError: A request cannot be answered.
            RewardError: A reward function failed.
            TimeoutError: It took longer than `timeout_s`.
        """
        try:
            work = self._collector.collect(request)
            return self._loop.run(work, timeout_s=timeout_s, what="rollouts", meanwhile=meanwhile)
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

    def leave(self) -> None:
        """End everything but the engines, which are asked nothing more. Calling it again does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._restarts.close()
        self._loop.run(self._close_clients(), timeout_s=10.0, what="connections to close")
        self._loop.close()

    def close(self) -> None:
        """End the engines and everything else. Calling it again does nothing."""
        self.leave()
        self.fleet.close()

    def _serve(self, version: int, names: Iterable[str]) -> None:
        """Have engines write that were proven to hold a version; the pool knows which of them are gone."""
        names = tuple(names)
        self._in_loop(lambda: self._pool.proven(version, names))
        serving = {load.name for load in self.loads() if load.state is State.READY}
        for name in sorted(self._away & serving & set(names)):
            self._away.discard(name)
            self._restarts.serves(name)
            logger.warning("%s holds weights version %d, proven, and writes again", name, version)

    def _end_lost(self, name: str, reason: str) -> bool:
        """End an engine that the pool has given up, and begin to bring it back. What is left of it is ended first."""
        self._away.add(name)
        self.fleet.end(name)
        if self._restarts.begin(name, reason):
            logger.warning("%s is lost and will be restarted; the others write what it was writing: %s", name, reason)
            return True
        logger.error("%s is ended, the run goes on with the other engines: %s", name, reason)
        self._pool.given_up(name, self._with_log(name, reason))
        return False

    def _give_up(self, name: str, reason: str) -> None:
        logger.error("%s is given up, the run goes on with the other engines: %s", name, reason)
        self._in_loop(lambda: self._pool.given_up(name, self._with_log(name, reason)))

    def _with_log(self, name: str, reason: str) -> str:
        log_path = next(engine.process.log_path for engine in self.fleet.engines if engine.name == name)
        return reason if log_path is None or str(log_path) in reason else f"{reason} (see {log_path})"

    def _in_loop(self, act: Callable[[], None]) -> None:
        """Do something to the pool, which belongs to the loop's thread."""

        async def run() -> None:
            act()

        self._loop.run(run(), timeout_s=_TELL_TIMEOUT_S, what="the pool of engines to take note")

    async def _close_clients(self) -> None:
        await asyncio.gather(*(client.aclose() for client in self._clients.values()), return_exceptions=True)
