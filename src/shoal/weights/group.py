"""The trainer and the engines that it has met: what every publish works with, on every trainer rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shoal.protocols import Ranks
from shoal.weights.control import ControlClient, EngineControl
from shoal.weights.line import EngineLine
from shoal.weights.sender import WeightSender
from shoal.wire.agreement import Cargo, Verify
from shoal.wire.plan import SlicePlan
from shoal.wire.transport import Backend

BATCH_BYTES = 128 << 20
"""Default bound on one batch. Two are under way at once, on each side, where scratch is needed at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAddress:
    """What is needed to publish to one engine.

    Attributes:
        client: Drives it.
        num_workers: Its tensor times pipeline parallel size.
        backend: What carries its weights.
        host: Name or address at which this host reaches the engine.
    """

    client: ControlClient
    num_workers: int
    backend: Backend
    host: str = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishSettings:
    """How publishes work.

    Attributes:
        host: Address of this host at which engines reach the trainer; None for the one on the way to each engine.
        timeout_s: For each step of a publish.
        verify: Compare digests, compare bit for bit as well, or do not compare.
        batch_bytes: See `BATCH_BYTES`.
    """

    host: str | None
    timeout_s: float
    verify: Verify = "digest"
    batch_bytes: int = BATCH_BYTES


@dataclass(slots=True, kw_only=True)
class EngineGroup:
    """What `shoal.weights.meeting` makes and publishes use.

    Attributes:
        ranks: The trainer's.
        settings: How publishes work.
        threads: For calls of engines.
        controls: The engines' control routes, on rank 0; elsewhere nothing.
        lines: To every engine.
        senders: Of each cargo.
        plans: Of each cargo: for each engine, its workers' slice plans.
        live: Numbers of the engines that have not left.
        attempt: Number of the last transfer.
    """

    ranks: Ranks
    settings: PublishSettings
    threads: ThreadPoolExecutor
    controls: Sequence[EngineControl]
    lines: Sequence[EngineLine]
    senders: Mapping[Cargo, WeightSender]
    plans: Mapping[Cargo, Sequence[Sequence[SlicePlan]]]
    live: list[int]
    attempt: int = 0

    def keep(self, live: Iterable[int]) -> None:
        """Go on with these engines alone. On all ranks."""
        keep = set(live)
        for index in self.live:
            if index not in keep:
                self.lines[index].close()
        self.live = [index for index in self.live if index in keep]

    def close(self) -> None:
        """Leave all engines."""
        self.keep(())
