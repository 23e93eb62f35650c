"""Shoal's own publishes to real engines: idle, under load, without proof, and with a fault on the wire."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from shoal.bench.children import StageError
from shoal.bench.load import RunningLoad
from shoal.bench.memory import MemoryWatch, Probe, TorchPeak, outside_torch, own_resident, resident, used_on_gpus
from shoal.bench.model import change_weights, make_sources
from shoal.bench.settings import BenchSettings
from shoal.bench.shapes import SHAPES
from shoal.engines.command import LOOPBACK
from shoal.engines.fleet import Fleet
from shoal.engines.process import EngineProcess
from shoal.errors import ShoalError, WeightProofError
from shoal.protocols import Ranks
from shoal.testing.transport import make_flipping
from shoal.types import PublishReport
from shoal.weights.group import EngineAddress, PublishSettings
from shoal.weights.publisher import WeightPublisher
from shoal.wire.agreement import Verify

NUM_WARM_UPS = 3
TIMEOUT_S = 120.0
_RUNNING_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """Memory that connecting and publishing took, in bytes, beyond what was in use before."""

    trainer: int
    engine: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Repeated publishes.

    Attributes:
        reports: Of each.
        running: Completions under way before each; empty without load.
    """

    reports: tuple[PublishReport, ...]
    running: tuple[int, ...] = ()


class PublishBench:
    """Publishes one model to one fleet. Every trainer rank has one, and calls its methods together.

    Args:
        settings: What is measured.
        model: This rank's.
        fleet: The engines, on rank 0; None elsewhere.
        ranks: The other trainer ranks.
        device: Where this rank's weights lie.
    """

    def __init__(
        self, settings: BenchSettings, model: Any, fleet: Fleet | None, *, ranks: Ranks, device: torch.device
    ) -> None:
        self._settings = settings
        self._model = model
        self._engines = fleet.engines if fleet is not None else ()
        self._ranks = ranks
        self._device = device
        self._version = 0

    def memory(self) -> Extra:
        """Connect for the first time and publish a few times; return what that took of memory."""
        with self._watching() as extra, self._connected() as publisher:
            for _ in range(NUM_WARM_UPS):
                self._publish(publisher)
            return extra()

    def idle(self) -> Published:
        """Publish with nothing running."""
        with self._connected() as publisher:
            for _ in range(NUM_WARM_UPS):
                self._publish(publisher)
            return Published(reports=tuple(self._publish(publisher) for _ in range(self._settings.repeats)))

    def with_and_without_proof(self) -> tuple[Published, Published]:
        """Publish with nothing running, in turn with the proof and without it."""
        proven, unproven = [], []
        with self._connected() as publisher:
            for verify in ("off", self._settings.verify):
                self._publish(publisher, verify)
            for _ in range(self._settings.repeats):
                proven.append(self._publish(publisher, self._settings.verify))
                unproven.append(self._publish(publisher, "off"))
        return Published(reports=tuple(proven)), Published(reports=tuple(unproven))

    def running(self) -> Published:
        """Publish while the engines write completions.

        Raises:
            StageError: They do not write as many as they are asked for.
        """
        counts, reports = [], []
        with self._connected() as publisher, ExitStack() as stack:
            for _ in range(NUM_WARM_UPS):
                self._publish(publisher)
            load = stack.enter_context(self._make_load()) if self._ranks.rank == 0 else None
            for _ in range(self._settings.repeats):
                counts.append(self._ranks.json(lambda: load and load.wait_until_running(_RUNNING_TIMEOUT_S)))
                reports.append(self._publish(publisher))
        return Published(reports=tuple(reports), running=tuple(counts))

    def control(self) -> bool:
        """Publish with one bit flipped on its way to the first engine; return whether that was found."""
        with self._connected() as publisher:
            self._publish(publisher)
            flipping = make_flipping(publisher, 0) if self._ranks.rank == 0 else None
            if flipping is not None:
                flipping.flip_first()
            error: ShoalError | None = None
            try:
                with _quiet_publisher():
                    self._publish(publisher)
            except ShoalError as failure:
                error = failure
            num_flips, kind = self._ranks.json(lambda: [flipping and flipping.num_flips, type(error).__name__])
            if num_flips != 1:
                raise StageError(f"{num_flips} bits were flipped instead of one, so nothing can be said")
            return bool(kind == WeightProofError.__name__)

    def _publish(self, publisher: WeightPublisher, verify: Verify | None = None) -> PublishReport:
        """Publish weights that differ from the former ones."""
        change_weights(self._model, self._settings)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._version += 1
        report = publisher.publish(self._version, verify=verify)
        if report.lost or report.num_workers != self._settings.num_workers:
            raise StageError(
                f"{report.num_workers} of {self._settings.num_workers} workers were reached: {report.lost}"
            )
        return report

    @contextmanager
    def _connected(self) -> Iterator[WeightPublisher]:
        publisher = WeightPublisher(
            make_sources(self._model, self._settings),
            [
                EngineAddress(
                    client=engine.client,
                    num_workers=self._settings.tensor_parallel_size,
                    backend=self._settings.backend,
                )
                for engine in self._engines
            ],
            ranks=self._ranks,
            device=self._device,
            settings=PublishSettings(host=LOOPBACK, timeout_s=TIMEOUT_S, verify=self._settings.verify),
        )
        with closing(publisher):
            publisher.connect()
            yield publisher

    def _make_load(self) -> RunningLoad:
        shape = SHAPES[self._settings.model_shape]
        return RunningLoad(
            [engine.client for engine in self._engines],
            self._settings.running_requests,
            max_tokens=shape.max_tokens,
            vocabulary=shape.vocabulary,
        )

    @contextmanager
    def _watching(self) -> Iterator[Callable[[], Extra]]:
        """Watch memory; the value given says what was taken so far, on the rank and the engines that took most."""
        is_gpu = self._device.type == "cuda"
        peak = TorchPeak(self._device) if is_gpu else None
        own: Probe = outside_torch(self._device) if is_gpu else own_resident()
        with ExitStack() as stack:
            trainer = stack.enter_context(MemoryWatch(own))
            engines = [stack.enter_context(MemoryWatch(probe)) for probe in self._engine_probes()]

            def extra() -> Extra:
                outside = trainer.extra_bytes
                taken = [watch.extra_bytes for watch in engines]
                if self._settings.is_colocated:
                    # The GPU cannot say whose memory it is: what is not in our allocator counts as the engine's.
                    taken, outside = [*taken, outside], 0
                mine = outside + (peak.extra_bytes if peak is not None else 0)
                gathered = self._ranks.gather_json([mine, max(taken, default=0)])
                return Extra(trainer=max(one for one, _ in gathered), engine=max(other for _, other in gathered))

            yield extra

    def _engine_probes(self) -> Sequence[Probe]:
        """One for each engine that runs on devices or processes of its own."""
        if self._settings.is_colocated:
            return ()
        if self._device.type == "cuda":
            return [used_on_gpus([visible]) for engine in self._engines for visible in engine.spec.cuda_devices]
        return [resident([cast(EngineProcess, engine.process).pid]) for engine in self._engines]


@contextmanager
def _quiet_publisher() -> Iterator[None]:
    """Do not have the publisher report a fault that was made on purpose."""
    logger = logging.getLogger("shoal.weights.publish_run")
    former = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = former
