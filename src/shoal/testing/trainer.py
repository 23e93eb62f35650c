"""`GRPOTrainer` with the slow exact engine in its own process: everything but vLLM is real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from shoal.engines.reference import ReferenceEngine
from shoal.rollout.collector import GroupRequest, RolloutCollector
from shoal.rollout.dispatch import DispatchSettings
from shoal.rollout.loop_thread import LoopThread
from shoal.rollout.pool import EnginePool, PoolSettings
from shoal.rollout.seats import EngineLoad
from shoal.testing.sequences import random_sequences
from shoal.trainer.engine_side import Sources
from shoal.trainer.factory import make_decoder
from shoal.trainer.grpo_trainer import GRPOTrainer
from shoal.trainer.rollouts import RollCall, Rollouts
from shoal.types import PublishReport, ScoredGroup, Sequence
from shoal.weights.publisher import WeightPublisher
from shoal.weights.sleep import SleepReport

POOL_SETTINGS = PoolSettings(dispatch=DispatchSettings(max_in_flight=1, affinity_margin=0), stall_s=60.0)


class ReferenceTrainer(GRPOTrainer):
    """Writes its rollouts with transformers, from the very weights that are trained, so that a publish is nothing."""

    def _start_rollouts(self) -> Rollouts:
        return reference_rollouts(self, self.accelerator.unwrap_model(self.model))

    def _make_sources(self) -> Sources:
        return {}

    def _make_publisher(self, sources: Sources, rollouts: Rollouts | None) -> WeightPublisher:
        return cast(WeightPublisher, _NoPublisher())


class MadeUpTrainer(ReferenceTrainer):
    """Trains on random sequences with advantages of -1 and 1: what is looked at is the trainer, not an engine."""

    lengths: tuple[tuple[int, int], ...]
    """For each sequence of a batch, of prompt and completion, in tokens; to be set before training."""

    def _write_batch(self, number: int) -> list[Sequence]:
        return [
            replace(sequence, advantage=1.0 if index % 2 else -1.0)
            for index, sequence in enumerate(random_sequences(self.lengths, seed=number))
        ]


def reference_rollouts(trainer: GRPOTrainer, model: Any) -> Rollouts:
    """Return what stands in for a trainer's engines and writes with `model`, which no rank may hold in parts."""
    return cast(
        Rollouts,
        _ReferenceRollouts(model, decode=make_decoder(trainer.processing_class), score=trainer._score_group),
    )


class _ReferenceRollouts:
    """Stands in for `Rollouts`."""

    def __init__(self, model: Any, *, decode: Any, score: Any) -> None:
        self._model = model
        self._engine = ReferenceEngine(model)
        self._loop = LoopThread("reference rollouts")
        self._pool = EnginePool([self._engine], POOL_SETTINGS)
        self._collector = RolloutCollector(self._pool, decode=decode, score=score)
        self.version: int | None = None
        self.published: list[int] = []

    def publishing(self, version: int) -> None:
        """The engine computes with the trainer's own weights."""

    def take(self, report: PublishReport) -> None:
        """Take note of the version."""
        self._pool.publishing(report.version)
        self._pool.proven(report.version, [self._engine.name])
        self.version = self._engine.weight_version = report.version
        self.published.append(report.version)

    def asleep(self, report: SleepReport) -> None:
        """The engine has no memory of its own to give back."""
        self.version = None

    def check_alive(self) -> None:
        """It lives as long as this process."""

    def roll_call(self, *, patience_s: float) -> RollCall:
        """The engine is always there."""
        return RollCall()

    def take_back(self) -> tuple[str, ...]:
        """It has never been away."""
        return ()

    def take_counts(self) -> dict[str, float]:
        """Nothing goes wrong."""
        return {}

    def collect(
        self, request: GroupRequest, *, timeout_s: float, meanwhile: Callable[[], None] | None = None
    ) -> tuple[ScoredGroup, ...]:
        """Have all groups written and rewarded."""
        was_training = self._model.training
        self._model.eval()
        try:
            work = self._collector.collect(request)
            return self._loop.run(work, timeout_s=timeout_s, what="rollouts", meanwhile=meanwhile)
        finally:
            self._model.train(was_training)

    def loads(self) -> tuple[EngineLoad, ...]:
        """Return what the engine is doing."""
        return self._pool.loads()

    def log_paths(self) -> tuple[None, ...]:
        """There is no log."""
        return (None,)

    def close(self) -> None:
        """End the loop."""
        self._loop.close()


class _NoPublisher:
    """Stands in for `WeightPublisher`: the engine computes with the trainer's own weights."""

    plans = ()
    live_engines = ("reference",)

    def connect(self) -> None:
        """There is nobody to meet."""

    def publish(self, version: int) -> PublishReport:
        """Say that it is done."""
        return PublishReport(version=version, num_workers=1, num_digests=0, num_bytes=0, lost={}, seconds=0.0)

    def sleep(self) -> SleepReport:
        """Say that it is done."""
        return SleepReport(asleep=(), lost={})

    def close(self) -> None:
        """There is nothing to leave."""
