"""`GRPOTrainer` with the slow exact engine in its own process: everything but vLLM is real."""

from __future__ import annotations

from typing import Any, cast

from shoal.engines.reference import ReferenceEngine
from shoal.rollout.collector import GroupRequest, RolloutCollector
from shoal.rollout.loop_thread import LoopThread
from shoal.rollout.pool import EngineLoad, EnginePool
from shoal.trainer.factory import make_decoder
from shoal.trainer.grpo_trainer import GRPOTrainer
from shoal.trainer.rollouts import Rollouts
from shoal.types import PublishReport, ScoredGroup


class ReferenceTrainer(GRPOTrainer):
    """Writes its rollouts with transformers, from the very weights that are trained, so that a publish is nothing."""

    def _start_rollouts(self) -> Rollouts:
        model = self.accelerator.unwrap_model(self.model)
        return cast(
            Rollouts, _ReferenceRollouts(model, decode=make_decoder(self.processing_class), score=self._score_group)
        )


class _ReferenceRollouts:
    """Stands in for `Rollouts`."""

    def __init__(self, model: Any, *, decode: Any, score: Any) -> None:
        self._model = model
        self._engine = ReferenceEngine(model)
        self._loop = LoopThread("reference rollouts")
        self._pool = EnginePool([self._engine], max_in_flight=1, affinity_margin=0)
        self._collector = RolloutCollector(self._pool, decode=decode, score=score)
        self.version: int | None = None
        self.published: list[int] = []

    def publish(self, version: int) -> PublishReport:
        """Take note of the version."""
        self.version = self._engine.weight_version = version
        self.published.append(version)
        return PublishReport(version=version, num_workers=1, num_digests=0, seconds=0.0)

    def collect(self, request: GroupRequest, *, timeout_s: float) -> tuple[ScoredGroup, ...]:
        """Have all groups written and rewarded."""
        was_training = self._model.training
        self._model.eval()
        try:
            return self._loop.run(self._collector.collect(request), timeout_s=timeout_s, what="rollouts")
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
