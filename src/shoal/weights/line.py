"""One trainer rank's line to one engine: who its members are, and what carries tensors to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from shoal.errors import WeightSyncError
from shoal.protocols import WeightTransport
from shoal.wire.abandonable import AbandonableCall
from shoal.wire.agreement import done_key, gave_up_key
from shoal.wire.liveness import excuse, expel
from shoal.wire.rendezvous import Store, join_store
from shoal.wire.transport import Backend, make_transport

T = TypeVar("T")

_GLANCE = timedelta(milliseconds=50)

PATIENCE = 0.5
"""Share of the time-out that a rank waits for one engine: the others, which wait meanwhile, have all of it."""

LAST_WORDS_S = 5.0
"""How long an engine that could not be reached may take to say why."""


class EngineLine:
    """Every trainer rank has one for each engine; a failure of one engine touches no other line.

    Members of its group are the trainer ranks, then the engine's workers.

    Args:
        name: Of the engine.
        store: Served by trainer rank 0.
        rank: This trainer rank.
        num_ranks: Trainer ranks.
        num_workers: Of the engine.
        backend: What carries the tensors.
        sleeps: Whether the engine sleeps between publishes.
        host: Address of this process that the engine can reach.
        device: Where this rank's tensors lie.
        timeout_s: For each step.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        *,
        rank: int,
        num_ranks: int,
        num_workers: int,
        backend: Backend,
        sleeps: bool = False,
        host: str,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self.name = name
        self.num_workers = num_workers
        self.backend: Backend = backend
        self.preferred: tuple[frozenset[int], ...] = (frozenset(),) * num_workers
        self._sleeps = sleeps
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._host = host
        self._device = device
        self._timeout_s = timeout_s
        self._transport: WeightTransport | None = None

    @property
    def transport(self) -> WeightTransport:
        """What carries tensors; there after `join`."""
        if self._transport is None:
            raise WeightSyncError(f"{self.name} has not joined the weight group, or has left it")
        return self._transport

    def member(self, worker: int) -> int:
        """Return a worker's number in the group."""
        return self._num_ranks + worker

    def worker_name(self, member: int) -> str:
        """Name the worker of a number in the group."""
        return f"{self.name} worker {member - self._num_ranks}"

    def prefer_own_device(self, ranks: Sequence[str], workers: Sequence[str]) -> None:
        """Where memory is shared, have each worker served by the ranks on its device as far as they hold what it needs.

        Args:
            ranks: For each trainer rank, what its device is known as.
            workers: For each worker, what its device is known as.
        """
        if self.backend == "ipc":
            self.preferred = tuple(
                frozenset(rank for rank, device in enumerate(ranks) if device == own) for own in workers
            )

    @property
    def wakes_on_own_device(self) -> bool:
        """Whether a worker that sleeps between publishes is on this rank's own device."""
        return self._sleeps and any(self._rank in ranks for ranks in self.preferred)

    def join(self) -> None:
        """Form the group with the workers, which must be doing the same.

        Raises:
            WeightSyncError: It took too long.
        """

        def make() -> WeightTransport:
            return make_transport(
                self._store,
                backend=self.backend,
                rank=self._rank,
                num_trainers=self._num_ranks,
                num_workers=self.num_workers,
                host=self._host,
                device=self._device,
                timeout_s=self._timeout_s * PATIENCE,
            )

        self._transport = within(self._timeout_s, make, f"{self.name} to join the weight group")

    def call_off(self) -> None:
        """Have nobody wait any longer for the workers to join: the engine has said that they do not."""
        with suppress(dist.DistError):  # only hastens what the others find out
            # Over a connection of its own: that of `join` is taken up with waiting.
            store = join_store(self._store.host, self._store.port, LAST_WORDS_S)
            for worker in range(self.num_workers):
                excuse(store, self.member(worker))

    def late_workers(self, attempt: int) -> list[str]:
        """Name the workers that others wait for: they have neither finished this publish nor given it up."""
        left = [worker for worker in range(self.num_workers) if self._last(done_key(worker)) != str(attempt)]
        awaited = [worker for worker in left if self._last(gave_up_key(worker)) != str(attempt)]
        return [self.worker_name(self.member(worker)) for worker in awaited or left]

    def close(self) -> None:
        """Leave the group, without waiting for the engine, which may be gone."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def expel(self) -> None:
        """Leave the group of an engine that has failed, and tell the other ranks, which may be waiting for it."""
        with suppress(dist.DistError):  # only hastens what they find out
            for worker in range(self.num_workers):
                expel(self._store, self.member(worker))
        self.close()

    def _last(self, key: str) -> str:
        """Return the number that a worker has left; nothing if it has left none."""
        try:
            self._store.wait([key], _GLANCE)
            return self._store.get(key).decode()
        except dist.DistError:
            return ""


def within(timeout_s: float, function: Callable[[], T], what: str) -> T:
    """Return what a blocking call returns; leave it behind if it takes too long.

    Raises:
        WeightSyncError: It took longer than `timeout_s`.
    """
    call = AbandonableCall(function, "weights")
    if not call.ends_within(timeout_s):
        raise WeightSyncError(f"waited {timeout_s:g} s for {what} (weight_sync_timeout_s)")
    return call.result()
