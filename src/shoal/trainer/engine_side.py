"""Keep the engines running and in step with the trainer's weights. Every rank has one; rank 0's holds the engines."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from shoal.errors import EngineError, EnginesLostError, WeightSyncError
from shoal.observe.ledger import TimeLedger
from shoal.protocols import Ranks, WeightSource
from shoal.rollout.collector import GroupRequest
from shoal.trainer.comebacks import Comebacks
from shoal.trainer.progress import log_plans
from shoal.trainer.rollouts import Rollouts
from shoal.trainer.shared_devices import SharedDevice
from shoal.types import PublishReport, ScoredGroup
from shoal.weights.publisher import WeightPublisher
from shoal.wire.agreement import Cargo

Sources = Mapping[Cargo, WeightSource]

_T = TypeVar("_T")


class EngineSide:
    """What the trainer has of its engines. `refresh`, `publish` and `during` are collectives.

    Args:
        ranks: The trainer's ranks.
        ledger: Takes the time spent here.
        make_sources: Makes this rank's part of what is published; on all ranks, before engines start.
        start: Starts the engines; on rank 0.
        make_publisher: Makes what publishes to them; on all ranks.
        shared: This rank's device, if engines sleep while the trainer works; on all ranks or on none.
    """

    def __init__(
        self,
        *,
        ranks: Ranks,
        ledger: TimeLedger,
        make_sources: Callable[[], Sources],
        start: Callable[[], Rollouts],
        make_publisher: Callable[[Sources, Rollouts | None], WeightPublisher],
        shared: SharedDevice | None = None,
    ) -> None:
        self._ranks = ranks
        self._ledger = ledger
        self._make_sources = make_sources
        self._start = start
        self._make_publisher = make_publisher
        self._shared = shared
        self.rollouts: Rollouts | None = None
        """The running engines; None before they start, and on ranks other than 0."""
        self.publisher: WeightPublisher | None = None
        """What publishes to them; None before they start."""
        self._comebacks: Comebacks | None = None
        self._handover_s: dict[str, float] = {}

    @property
    def sleeps(self) -> bool:
        """Whether engines sleep while the trainer works; a publish is then left to the next `refresh`."""
        return self._shared is not None

    def rest(self) -> None:
        """Let engines that share the trainer's devices sleep until the next publish. A collective.

        Raises:
            WeightSyncError: No engine is left.
        """
        if self._shared is None or self.publisher is None:
            return
        with self._handing_over("sleep"):
            report = self.publisher.sleep()
            if self.rollouts is not None:
                self.rollouts.asleep(report)
            self._shared.take()

    def refresh(self, version: int, *, always: bool) -> PublishReport | None:
        """Have engines run that hold the weights of `version`; publish them if need be.

        Args:
            version: Of the weights that the model has.
            always: Publish in any case, as when somebody may have changed the model under the same version.
        """

        def is_stale() -> bool:
            return always or self.rollouts is None or self.rollouts.version != version

        return self.publish(version) if self._ranks.json(is_stale) else None

    def publish(self, version: int) -> PublishReport:
        """Have every engine hold the current weights, proven, under this version. Starts the engines if need be.

        Engines that are lost meanwhile are restarted and take part in a later one, or at once if there is no other.

        Raises:
            WeightSyncError: A trainer rank failed, or an engine holds something else than was sent.
            NoEngineError: No engine is left, and none can be restarted.
            EngineStartError: An engine did not start.
        """
        self._make_room()
        while True:
            publisher = self._connected()
            assert self._comebacks is not None
            self._comebacks.muster()
            try:
                return self._publish_to_all(publisher, version)
            except EnginesLostError as error:
                if not error.lost:
                    raise  # a former publish has failed as a whole, and nobody was met since
                if self.rollouts is not None:
                    self.rollouts.lost(error.lost)

    def during(self, work: Callable[[], _T]) -> Callable[[], _T]:
        """Do something on rank 0 that collects rollouts, while all ranks stand by for engines that come back.

        Returns:
            What gives the result on rank 0, or raises what `work` has raised; see `Comebacks.during`.

        Raises:
            NoEngineError: No engine is left, and none can be restarted.
        """
        assert self._comebacks is not None, "engines run by the time that something is collected"
        return self._comebacks.during(work)

    def collect(self, request: GroupRequest, *, timeout_s: float) -> tuple[ScoredGroup, ...]:
        """Have all groups written and rewarded; see `Rollouts.collect`. On rank 0, within `during`."""
        assert self.rollouts is not None and self._comebacks is not None, "engines run by then"
        return self.rollouts.collect(request, timeout_s=timeout_s, meanwhile=self._comebacks.meanwhile)

    def take_counts(self) -> dict[str, float]:
        """Return what has gone wrong with engines since the last call, as metrics. On rank 0."""
        assert self.rollouts is not None, "engines run by then"
        return self.rollouts.take_counts()

    def take_handover(self) -> dict[str, float]:
        """Return the seconds in which devices changed hands since the last call, as metrics; none if no engine sleeps.

        Waking is part of a publish, and counted there.
        """
        taken, self._handover_s = self._handover_s, {}
        return {f"seconds/{phase.replace(' ', '_')}": seconds for phase, seconds in taken.items()}

    def forget(self) -> None:
        """Have the weights published before the engines write again, whatever version they hold."""
        if self.rollouts is not None:
            self.rollouts.version = None

    def close(self) -> None:
        """End the engines. A later `publish` starts them again."""
        if self.publisher is not None:
            self.publisher.close()
            self.publisher = self._comebacks = None
        if self.rollouts is not None:
            self.rollouts.close()
            self.rollouts = None

    def _publish_to_all(self, publisher: WeightPublisher, version: int) -> PublishReport:
        if self.rollouts is not None:
            self.rollouts.publishing(version)
        try:
            with self._ledger.phase("publish"):
                report = publisher.publish(version)
        except EnginesLostError:
            raise
        except WeightSyncError:
            if self.rollouts is not None:
                # A dead process explains a failed publish better than the publish does.
                self.rollouts.check_alive()
            raise
        if self.rollouts is not None:
            self.rollouts.take(report)
        return report

    def _make_room(self) -> None:
        """Have no engine start or wake before every rank has given its memory back."""
        if self._shared is None:
            return
        failure: Exception | None = None
        with self._handing_over("make room"):
            try:
                self._shared.give()
            except Exception as error:  # all ranks learn of it before any raises
                failure = error
            said = [text for text in self._ranks.gather_json(str(failure or "")) if text]
        if failure is not None:
            raise failure
        if said:
            raise EngineError(f"another trainer rank could not give its memory back: {said[0]}")

    @contextmanager
    def _handing_over(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        with self._ledger.phase(phase):
            yield
        self._handover_s[phase] = self._handover_s.get(phase, 0.0) + time.monotonic() - began

    def _connected(self) -> WeightPublisher:
        if self.publisher is None:
            with self._ledger.phase("start engines"):
                sources = self._make_sources()  # refuses what cannot be sent while nothing runs yet
                self._ranks.json(self._start_rollouts)
                publisher = self._make_publisher(sources, self.rollouts)
                try:
                    publisher.connect()
                except BaseException:
                    publisher.close()
                    raise
                self.publisher = publisher
                self._comebacks = Comebacks(self._ranks, publisher, self.rollouts)
            log_plans(self.publisher.plans)
        return self.publisher

    def _start_rollouts(self) -> None:
        if self.rollouts is not None:
            return  # they run already: only the meeting failed
        self.rollouts = self._start()
        # Ends the engines when the interpreter exits; their guards do so when it has no time to.
        weakref.finalize(self, self.rollouts.close)
