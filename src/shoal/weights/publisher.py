"""Publish the trainer's weights to every engine, and prove that each worker holds them.

Order: pause each engine (keeping what runs) → send every piece → compare digests → resume, after a failure too. An
engine that fails leaves the group, and the others go on with the new weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        self._group = Meeting(
            self._sources,
            self._engines,
            self._controls,
            ranks=self._ranks,
            device=self._device,
            settings=self._settings,
            threads=self._threads,
        ).hold()

    def publish(self, version: int, *, verify: Verify | None = None) -> PublishReport:
        """Send the current weights and prove them. Repeating it with the same version is harmless.

        An engine that fails is named in the report and takes part no more; the others hold the new weights and go on.

        Args:
            version: Of the weights.
            verify: Another way for this once than the settings'.

        Raises:
            WeightSyncError: No engine is left, or a trainer rank failed.
            WeightProofError: An engine holds something else than was sent. The others hold the new weights.
        """
        self.num_publishes += 1
        verify = verify or self._settings.verify
        run = PublishRun(self.group, version, verify)
        try:
            for cargo in self._due():
                run.transfer(cargo)
        except BaseException:
            run.give_up()
            raise
        report = run.finish()
        self._has_published = True
        self.num_proven += verify != "off"
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

    def _due(self) -> list[Cargo]:
        """List what has to be sent: everything at first; where an adapter is sent alone, then that."""
        if ADAPTER in self._sources and self._has_published:
            return [ADAPTER]
        return list(self._sources)
