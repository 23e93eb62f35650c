"""The trainer and the engines that it has met: what every publish works with, on every trainer rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shoal.errors import WeightSyncError
from shoal.protocols import Ranks
from shoal.weights.control import ControlClient, EngineControl
from shoal.weights.line import EngineLine
from shoal.weights.sender import WeightSender
from shoal.wire.agreement import Cargo, Verify
from shoal.wire.plan import SlicePlan
from shoal.wire.transport import Backend

BATCH_BYTES = 128 << 20
"""Default bound on one batch. Two are under way at once where a side needs scratch for them, else more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAddress:
    """What is needed to publish to one engine.

    Attributes:
        client: Drives it.
        num_workers: Its tensor times pipeline parallel size.
        backend: What carries its weights.
        sleeps: Whether it sleeps between publishes.
        host: Name or address at which this host reaches the engine.
    """

    client: ControlClient
    num_workers: int
    backend: Backend
    sleeps: bool = False
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
    controls: list[EngineControl]
    lines: list[EngineLine]
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

    def admit(self, index: int, met: EngineGroup) -> None:
        """Take in an engine that was met by itself, in the place of its former life. On all ranks.

        Raises:
            WeightSyncError: It takes other parameters than the engines did that were met together.
        """
        (line,) = met.lines
        senders = {cargo: sender.with_line(index, line, met.plans[cargo][0]) for cargo, sender in self.senders.items()}
        for cargo, sender in senders.items():
            # Both ends cut batches from what is wanted, and this engine was told what it wants alone.
            if odd := sender.wanted ^ met.senders[cargo].wanted:
                raise WeightSyncError(
                    f"{line.name} takes other parameters than the engines that the run began with: {min(odd)}, for one"
                )
        self.lines[index].close()
        self.lines[index] = line
        if met.controls:
            self.controls[index] = met.controls[0]
        self.senders = senders
        self.plans = {
            cargo: [*plans[:index], met.plans[cargo][0], *plans[index + 1 :]] for cargo, plans in self.plans.items()
        }
        self.attempt = max(self.attempt, met.attempt)
        self.live = sorted({*self.live, index})

    def close(self) -> None:
        """Leave all engines."""
        self.keep(())
