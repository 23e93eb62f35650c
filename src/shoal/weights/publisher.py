"""Publish the trainer's weights to every engine, and prove that each worker holds them.

Order: pause each engine (keeping what runs) → send every piece → compare digests → resume, after a failure too. An
engine that fails leaves the group, and the others go on with the new weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from shoal.errors import WeightSyncError
from shoal.protocols import Ranks, WeightSource
from shoal.types import PublishReport
from shoal.weights.control import EngineControl
from shoal.weights.group import EngineAddress, EngineGroup, PublishSettings
from shoal.weights.meeting import Meeting
from shoal.weights.publish_run import PublishRun
from shoal.weights.sleep import Bedtime, SleepReport
from shoal.wire.agreement import ADAPTER, Cargo, Verify
from shoal.wire.plan import SlicePlan

_THREADS_PER_ENGINE = 2
"""One that drives it, and one to spare for a call that hangs."""


class WeightPublisher:
    """Sends the trainer's weights to all engines. Every trainer rank has one, and calls its methods together.

    Args:
        sources: This rank's part of what is published: `MODEL`, and `ADAPTER` where the adapter alone is published
            after the first time.
        engines: On rank 0, all engines; elsewhere nothing.
        ranks: The other trainer ranks.
        device: Where this rank's weights lie.
        settings: How it works.
    """

    def __init__(
        self,
        sources: Mapping[Cargo, WeightSource],
        engines: Sequence[EngineAddress],
        *,
        ranks: Ranks,
        device: torch.device,
        settings: PublishSettings,
    ) -> None:
        self._sources = dict(sources)
        self._engines = tuple(engines)
        self._ranks = ranks
        self._device = device
        self._settings = settings
        num_threads = max(1, _THREADS_PER_ENGINE * len(self._engines))
        self._threads = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="publish")
        self._controls = [
            EngineControl(engine.client, self._threads, settings.timeout_s, sleeps=engine.sleeps)
            for engine in self._engines
        ]
        self._group: EngineGroup | None = None
        self._bedtime = Bedtime()
        self._has_published = False
        self.num_publishes = 0
        self.num_proven = 0

    @property
    def group(self) -> EngineGroup:
        """The engines that were met.

        Raises:
            WeightSyncError: `connect` has not been called, or failed.
        """
        if self._group is None:
            raise WeightSyncError("no engine has been met: call connect() before publish()")
        return self._group

    @property
    def plans(self) -> tuple[SlicePlan, ...]:
        """Every worker's slice plans; empty before `connect`."""
        if self._group is None:
            return ()
        return tuple(plan for engines in self._group.plans.values() for plans in engines for plan in plans)

    @property
    def live_engines(self) -> tuple[str, ...]:
        """Names of the engines that have not left the group."""
        return tuple(self._group.lines[index].name for index in self._group.live) if self._group is not None else ()

    def connect(self) -> None:
        """Meet every engine's workers, learn their slice plans, and agree on who sends what. Again: begin anew.

        Raises:
            WeightSyncError: An engine did not come, or holds another model.
        """
        former, self._group = self._group, None
        if former is not None:
            former.close()
        self._has_published = False
        self._group = self._meet(self._engines, self._controls)

    def leave(self, names: Collection[str]) -> None:
        """Publish to these engines no more. A collective."""
        group = self.group
        group.keep([index for index in group.live if group.lines[index].name not in names])

    def admit(self, name: str, engine: EngineAddress | None) -> None:
        """Meet an engine that has come back, in the place of its former life. The next publish fills it. A collective.

        Args:
            name: Of an engine that was among the first.
            engine: On rank 0, where it now is.

        Raises:
            WeightSyncError: It did not come, or holds another model. All ranks learn of it; nothing else has changed.
        """
        self._admit(name, self._meet_alone(engine))
        self._has_published = False

    def refill(self, name: str, engine: EngineAddress | None, version: int) -> PublishReport:
        """Meet an engine that has come back, and have it alone hold the current weights, proven. A collective.

        The other engines are not touched; from the next publish on it is one of them.

        Args:
            name: Of an engine that was among the first.
            engine: On rank 0, where it now is.
            version: Of the weights.

        Raises:
            WeightSyncError: As for `admit`, or it could not be filled.
            WeightProofError: It holds something else than was sent.
        """
        met = self._meet_alone(engine)
        report = self._run(met, version, list(self._sources), self._settings.verify)
        self._admit(name, met)
        return report

    def publish(self, version: int, *, verify: Verify | None = None) -> PublishReport:
        """Send the current weights and prove them. Repeating it with the same version is harmless.

        An engine that fails is named in the report and takes part no more; the others hold the new weights and go on.

        Args:
            version: Of the weights.
            verify: Another way for this once than the settings'.

        Raises:
            EnginesLostError: No engine is left.
            WeightSyncError: A trainer rank failed.
            WeightProofError: An engine holds something else than was sent. The others hold the new weights.
        """
        report = self._run(self.group, version, self._due(), verify or self._settings.verify)
        self._has_published = True
        return report

    def sleep(self) -> SleepReport:
        """Have the engines that share this trainer's devices give their memory back until the next publish.

        None of them may be writing: what it writes is aborted. What a sleeping engine holds counts as unproven.

        Raises:
            WeightSyncError: No engine is left.
        """
        return self._bedtime.begin(self.group)

    def close(self) -> None:
        """Leave all groups and give the threads back."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._group is not None:
            self._group.close()

    def _run(self, group: EngineGroup, version: int, cargoes: Sequence[Cargo], verify: Verify) -> PublishReport:
        self.num_publishes += 1
        run = PublishRun(group, version, verify)
        try:
            for cargo in cargoes:
                run.transfer(cargo)
        except BaseException:
            run.give_up()
            raise
        report = run.finish()
        self.num_proven += verify != "off"
        return report

    def _meet(self, engines: Sequence[EngineAddress], controls: Sequence[EngineControl]) -> EngineGroup:
        return Meeting(
            self._sources,
            engines,
            controls,
            ranks=self._ranks,
            device=self._device,
            settings=self._settings,
            threads=self._threads,
        ).hold()

    def _meet_alone(self, engine: EngineAddress | None) -> EngineGroup:
        engines = [engine] if engine is not None else []
        return self._meet(
            engines, [EngineControl(one.client, self._threads, self._settings.timeout_s) for one in engines]
        )

    def _admit(self, name: str, met: EngineGroup) -> None:
        lines = self.group.lines
        try:
            self.group.admit(next(index for index, line in enumerate(lines) if line.name == name), met)
        except BaseException:
            met.close()
            raise

    def _due(self) -> list[Cargo]:
        """List what has to be sent: everything at first; where an adapter is sent alone, then that."""
        if ADAPTER in self._sources and self._has_published:
            return [ADAPTER]
        return list(self._sources)
