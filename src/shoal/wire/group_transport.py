"""Parcels over a torch process group: Gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist

from shoal.protocols import Parcel, Pending
from shoal.wire.abandonable import AbandonableCall
from shoal.wire.liveness import LateError, Peers, patience_left
from shoal.wire.rendezvous import Group

Direction: TypeAlias = Literal["send", "recv"]

_POLL_S = 50e-6
_LIVENESS_PERIOD_S = 0.2
_GRACE_S = 1.0
_ABORT_S = 10.0


class GlooTransport:
    """Parcels between CPUs over TCP.

    Everything is posted at once, so peers come in any order; what blocks is waiting. After any failure, a time-out
    included, the group is broken and every call raises the same error.

    Args:
        group: A Gloo process group of all members.
        peers: Watches the members that this one exchanges with.
        timeout_s: For `Pending.wait`.
    """

    def __init__(self, group: Group, peers: Peers, timeout_s: float) -> None:
        self._group: Group | None = group
        self._peers = peers
        self._timeout_s = timeout_s
        self._num_sent: Counter[int] = Counter()
        self._num_received: Counter[int] = Counter()
        self._under_way: deque[_GlooBatch] = deque()
        self._lock = threading.Lock()
        self._failure: Exception | None = None

    def send(self, parcels: Sequence[Parcel]) -> Pending:
        """Start sending."""
        return self._post(parcels, self._open_group().send, self._num_sent)

    def receive(self, parcels: Sequence[Parcel]) -> Pending:
        """Start receiving."""
        return self._post(parcels, self._open_group().recv, self._num_received)

    def finish(self, timeout_s: float) -> None:
        """Block until all that was started is done."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._raise_failure()
            with self._lock:
                if not self._under_way:
                    return
                batch = self._under_way[0]
            batch.wait_for(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Leave. Members that wait for this one learn of it within seconds."""
        with self._lock:
            self._failure = self._failure or ConnectionError("the transport is closed")
            self._under_way.clear()
            self._group = None  # with the last reference, the works' included, the connections close
        self._peers.leave()

    def fail(self, error: Exception) -> Exception:
        """Record a failure of the group and return it in the protocol's terms."""
        with self._lock:
            if self._failure is None:
                known = isinstance(error, ConnectionError | TimeoutError)
                self._failure = error if known else ConnectionError(f"Gloo failed: {error}")
                self._under_way.clear()
            return self._failure

    def forget(self, batch: _GlooBatch) -> None:
        """Take a batch that is done off the list."""
        with self._lock:
            if batch in self._under_way:
                self._under_way.remove(batch)

    def check(self) -> None:
        """Raise what has broken the group, which another thread may have closed, or whom it has lost."""
        self._raise_failure()
        self._peers.check_all()

    def _post(self, parcels: Sequence[Parcel], operation: Callable[..., dist.Work], tags: Counter[int]) -> Pending:
        self._raise_failure()
        works: list[tuple[dist.Work, int]] = []
        for parcel in parcels:
            if parcel.tensor.numel() == 0:
                continue  # the far side leaves it out as well
            if parcel.tensor.device.type != "cpu":
                raise ValueError(f"Gloo carries tensors on the CPU, not on {parcel.tensor.device}")
            tag = tags[parcel.peer] % (1 << 31)
            tags[parcel.peer] += 1
            try:
                works.append((operation([as_bytes(parcel.tensor)], parcel.peer, tag), parcel.peer))
            except RuntimeError as error:
                raise self.fail(error) from error
        batch = _GlooBatch(self, works, self._timeout_s)
        with self._lock:
            self._under_way.append(batch)
        return batch

    def _open_group(self) -> Group:
        self._raise_failure()
        return self._group

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


class _GlooBatch:
    """Works of one call, waited for on a thread that can be left behind.

    Gloo's own wait does not tell that a peer died in the middle of a tensor: what was half received stays pending.
    """

    def __init__(self, transport: GlooTransport, works: list[tuple[dist.Work, int]], timeout_s: float) -> None:
        self._transport = transport
        self._works = works
        self._posted = time.monotonic()
        self._timeout_s = timeout_s
        self._awaited: int | None = None
        self._lock = threading.Lock()
        self._waiting: AbandonableCall[None] | None = None

    def wait(self) -> None:
        """Block until the parcels are through."""
        self.wait_for(patience_left(self._posted, self._timeout_s))

    def wait_for(self, timeout_s: float) -> None:
        """Block until the parcels are through, for so long at most."""
        waiting = self._start_waiting(timeout_s)
        try:
            if not _ends_in_time(waiting, timeout_s, self._transport.check):
                limit = max(timeout_s, self._timeout_s)
                members = () if self._awaited is None else (self._awaited,)
                raise LateError(f"a transfer of weights over Gloo took more than {limit:g} s", members)
            waiting.result()
        except (OSError, RuntimeError) as error:
            raise self._transport.fail(error) from error
        self._transport.forget(self)

    def _start_waiting(self, timeout_s: float) -> AbandonableCall[None]:
        with self._lock:
            if self._waiting is None:
                self._waiting = AbandonableCall(lambda: self._wait(timeout_s), "weight-gloo")
            return self._waiting

    def _wait(self, timeout_s: float) -> None:
        """Wait for each work, once, as Gloo has it. The time-out only ends a thread that was left behind."""
        try:
            for work, peer in self._works:
                self._awaited = peer
                work.wait(timedelta(seconds=timeout_s + _GRACE_S))
        finally:
            self._works = []


class NcclTransport:
    """Parcels between GPUs, straight from and into the tensors' own memory.

    A batch is one NCCL group call, and groups run one after another on the communicator's stream: members must list
    their batches in one order that is the same everywhere, or they wait for one another for ever.

    The first batch to or from a peer connects the two, for which NCCL blocks the host until the peer does the same.

    Args:
        group: An NCCL process group of all members, its communicator made.
        device: This member's GPU.
        peers: Watches the members that this one exchanges with.
        timeout_s: For connecting.
    """

    def __init__(self, group: Group, device: torch.device, peers: Peers, timeout_s: float) -> None:
        self._group: Group | None = group
        self._device = device
        self._peers = peers
        self._timeout_s = timeout_s
        self._connected: set[tuple[Direction, int]] = set()
        self._lock = threading.Lock()
        self._under_way: deque[dist.Work] = deque()
        self._failure: Exception | None = None

    def send(self, parcels: Sequence[Parcel]) -> Pending:
        """Start sending, after what the current stream does so far."""
        return self._post(parcels, "send")

    def receive(self, parcels: Sequence[Parcel]) -> Pending:
        """Start receiving, after what the current stream does so far."""
        return self._post(parcels, "recv")

    def finish(self, timeout_s: float) -> None:
        """Block until all that was started is done.

        After a failure the communicator is aborted, so that no kernel stays behind waiting for a peer.
        """
        self._open_group()
        deadline = time.monotonic() + timeout_s
        next_look = time.monotonic() + _LIVENESS_PERIOD_S
        try:
            while self._under_way:
                work = self._under_way[0]
                if work.is_completed():
                    work.wait(timedelta(seconds=_ABORT_S))  # with a time-out, NCCL's own errors are raised here
                    self._under_way.popleft()
                    continue
                now = time.monotonic()
                if now >= next_look:
                    self._peers.check_all()
                    next_look = now + _LIVENESS_PERIOD_S
                if now >= deadline:
                    raise LateError(f"a transfer of weights over NCCL took more than {timeout_s:g} s")
                time.sleep(_POLL_S)
        except (OSError, RuntimeError) as error:
            raise self._fail(error) from error

    def close(self) -> None:
        """Leave: what is under way is aborted."""
        self._failure = self._failure or ConnectionError("the transport is closed")
        self._abort()

    def _post(self, parcels: Sequence[Parcel], direction: Direction) -> Pending:
        group = self._open_group()
        filled = [(as_bytes(parcel.tensor), parcel.peer) for parcel in parcels if parcel.tensor.numel()]
        if not filled:
            return _Done()
        operation = group.send if direction == "send" else group.recv

        def start() -> dist.Work:
            with torch.cuda.device(self._device):
                group._start_coalescing()
                try:
                    for value, peer in filled:
                        operation([value], peer, 0)
                finally:
                    work: dist.Work = group._end_coalescing()
                return work

        routes = {(direction, peer) for _, peer in filled}
        with self._lock:
            work = start() if routes <= self._connected else self._connect(start)
            self._connected |= routes
            self._under_way.append(work)
        return _NcclBatch(work, self._device)

    def _connect(self, start: Callable[[], dist.Work]) -> dist.Work:
        """Start a batch that blocks until its peers start theirs."""
        stream = torch.cuda.current_stream(self._device)

        def start_after_stream() -> dist.Work:
            with torch.cuda.stream(stream):  # a choice of each thread
                return start()

        call = AbandonableCall(start_after_stream, "connect-nccl")
        try:
            if not _ends_in_time(call, self._timeout_s, self._peers.check_all):
                raise LateError(f"members did not connect over NCCL within {self._timeout_s:g} s")
            return call.result()
        except (OSError, RuntimeError) as error:
            raise self._fail(error) from error

    def _fail(self, error: Exception) -> Exception:
        self._failure = error if isinstance(error, OSError) else ConnectionError(f"NCCL failed: {error}")
        self._abort()
        return self._failure

    def _open_group(self) -> Group:
        if self._failure is not None:
            raise self._failure
        return self._group

    def _abort(self) -> None:
        """Abort on a thread that can be left behind: aborting a communicator may itself wait for a hung driver."""
        group, self._group = self._group, None
        self._under_way.clear()
        if group is None:
            return
        self._peers.leave()
        AbandonableCall(group.abort, "abort-nccl").ends_within(_ABORT_S)


class _NcclBatch:
    def __init__(self, work: dist.Work, device: torch.device) -> None:
        self._work = work
        self._device = device

    def wait(self) -> None:
        """Have the current stream wait; the host goes on."""
        with torch.cuda.device(self._device):
            self._work.wait()


def _ends_in_time(call: AbandonableCall[Any], timeout_s: float, check: Callable[[], None]) -> bool:
    """Wait for a call as long as `check` raises nothing; return whether it ended in time."""
    deadline = time.monotonic() + timeout_s
    while not call.ends_within(min(_LIVENESS_PERIOD_S, deadline - time.monotonic())):
        try:
            check()
        except ConnectionError:
            # What a peer sent before it left may still be in the pipe.
            if not call.ends_within(_GRACE_S):
                raise
        if time.monotonic() >= deadline:
            return call.ends_within(0)
    return True


class _Done:
    def wait(self) -> None:
        """Nothing was to be sent."""


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View a contiguous tensor as bytes, a type that every backend has.

    Raises:
        ValueError: It is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError(
            f"a parcel must be contiguous, not of strides {tensor.stride()} for shape {tuple(tensor.shape)}"
        )
    return tensor.detach().view(-1).view(torch.uint8)


def warm_up(
    transport: NcclTransport, *, device: torch.device, peers: Sequence[int], sends: bool, timeout_s: float
) -> None:
    """Exchange one byte with every peer, which makes NCCL's channels, so that the first publish need not."""
    parcels = [Parcel(torch.zeros(1, dtype=torch.uint8, device=device), peer) for peer in peers]
    if sends:
        transport.send(parcels)
    else:
        transport.receive(parcels)
    transport.finish(timeout_s)
