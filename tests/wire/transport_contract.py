"""What every transport of weights must do: cases that members run in processes of their own, over any backend.

Tests import it for `run`, which starts it once for each member.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import pytest
import torch

from shoal.protocols import Parcel, WeightTransport
from shoal.wire.device_memory import HANDLE_BYTES, Copy
from shoal.wire.ipc_transport import IpcTransport
from shoal.wire.liveness import Peers
from shoal.wire.rendezvous import Store, host_store, join_store
from shoal.wire.transport import make_transport

FOLDER = Path("/dev/shm")
HOST = "127.0.0.1"
TIMEOUT_S = 120.0
SOON_S = 60.0  # at once, on a machine that has other work
LONGEST_S = 2 * TIMEOUT_S  # of all the cases of a run
STAGING_BYTES = 1 << 20  # less than the largest parcel: it must be cut
# Elements of what is not to get through. NCCL takes up to 128 MiB off a sender's hands (4 MiB for each of 32 channels).
LARGE = {"cpu": 16 << 20, "cuda": 128 << 20}

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)

TestedBackend = Literal["gloo", "nccl", "ipc", "ipc over host memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of a case."""

    transport: WeightTransport
    store: Store
    rank: int
    num_trainers: int
    num_workers: int
    device: torch.device
    memory: HostMemory | None

    def lendable(self, value: torch.Tensor) -> torch.Tensor:
        """Return it in memory that others can reach, as all of a GPU's is."""
        return value if self.memory is None else self.memory.place(value)

    @property
    def is_trainer(self) -> bool:
        return self.rank < self.num_trainers

    @property
    def peers(self) -> range:
        size = self.num_trainers + self.num_workers
        return range(self.num_trainers, size) if self.is_trainer else range(self.num_trainers)

    def meet(self, name: str) -> None:
        """Wait for all members."""
        size = self.num_trainers + self.num_workers
        self.store.set(f"{name}/{self.rank}", "")
        self.store.wait([f"{name}/{rank}" for rank in range(size)], timedelta(seconds=TIMEOUT_S))


class HostMemory:
    """Host memory in the place of a GPU's: the whole of CUDA IPC but CUDA."""

    name = "the host"

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}
        self._places: dict[int, bytes] = {}

    def place(self, value: torch.Tensor) -> torch.Tensor:
        """Return a copy that lies where another process can reach it."""
        address, handle = self.allocate(value.nbytes)
        self._places[address] = handle
        memory = (ctypes.c_uint8 * value.nbytes).from_address(address)
        placed = torch.frombuffer(memory, dtype=torch.uint8).view(value.dtype).reshape(value.shape)
        return placed.copy_(value)

    def export(self, address: int) -> tuple[bytes, int] | None:
        if address not in self._places:
            return None
        return self._places[address].ljust(HANDLE_BYTES, b"\0"), 0

    def open_handle(self, handle: bytes) -> int:
        with Path(handle.rstrip(b"\0").decode()).open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self._maps[address] = mapped
        return address

    def check_reach(self, name: str) -> None:
        assert name == self.name

    def allocate(self, num_bytes: int) -> tuple[int, bytes]:
        path = FOLDER / f"shoal-test-{os.getpid()}-{os.urandom(8).hex()}"  # `run` removes it
        path.write_bytes(bytes(num_bytes))
        return self.open_handle(str(path).encode()), str(path).encode()

    def release(self, address: int) -> None:
        del self._maps[address]

    def shut(self, address: int) -> None:
        del self._maps[address]

    def mark(self) -> HostMemory:
        return self

    def query(self) -> bool:
        return True

    def copy(self, copies: Sequence[Copy], after: Sequence[object]) -> HostMemory:
        for target, source, num_bytes in copies:
            ctypes.memmove(target, source, num_bytes)
        return self


def values(sender: int, receiver: int, device: torch.device) -> list[torch.Tensor]:
    """Return what one member sends to another: every type, no elements and one, many tiny ones, two large ones."""
    generator = torch.Generator().manual_seed(1000 * sender + receiver)

    def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        element = torch.empty((), dtype=dtype).element_size()
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, element), generator=generator)
        return raw.to(torch.uint8).view(dtype).reshape(shape).to(device)

    sizes = ((), (0,), (1,), (3, 5), (257,))
    tensors = [of(dtype, *shape) for dtype in DTYPES for shape in sizes]
    tensors += [of(torch.bfloat16, 1 + index % 7) for index in range(1000)]
    tensors += [of(torch.bfloat16, 1 << 20, 3), of(torch.bfloat16, 7), of(torch.bfloat16, 1 << 20, 5)]
    return tensors


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _send_all(member: Member, num_batches: int) -> None:
    per_peer = []
    for peer in member.peers:
        *others, last = values(member.rank, peer, member.device)
        per_peer.append([Parcel(value, peer) for value in (*others, member.lendable(last))])
    mixed = [parcel for parcels in zip(*per_peer, strict=True) for parcel in parcels]
    cut = -(-len(mixed) // num_batches)
    for start in range(0, len(mixed), cut):
        member.transport.send(mixed[start : start + cut]).wait()


def _receive_all(member: Member, num_batches: int) -> None:
    expected = [values(peer, member.rank, member.device) for peer in member.peers]
    targets = [[torch.zeros_like(value) for value in of_peer] for of_peer in expected]
    mixed = [
        Parcel(target, peer)
        for of_all in zip(*targets, strict=True)
        for peer, target in zip(member.peers, of_all, strict=True)
    ]
    cut = -(-len(mixed) // num_batches)
    for start in range(0, len(mixed), cut):
        member.transport.receive(mixed[start : start + cut]).wait()
    for of_peer, wanted in zip(targets, expected, strict=True):
        assert all(same_bits(*pair) for pair in zip(of_peer, wanted, strict=True))
    # The control: another sender's values, or these in another order, would have been noticed.
    strangers = values(99, member.rank, member.device)
    assert not all(same_bits(*pair) for pair in zip(targets[0], strangers, strict=True))
    assert not same_bits(targets[0][-1], targets[0][-1].flip(0))


def values_arrive_bit_for_bit(member: Member) -> None:
    for num_batches in (1, 3):
        (_send_all if member.is_trainer else _receive_all)(member, num_batches)
        member.transport.finish(TIMEOUT_S)


def batches_need_not_be_cut_alike(member: Member) -> None:
    if member.is_trainer:
        _send_all(member, 5)
    else:
        _receive_all(member, 2)
    member.transport.finish(TIMEOUT_S)


def workers_send_back(member: Member) -> None:
    (_send_all if member.is_trainer else _receive_all)(member, 2)
    (_receive_all if member.is_trainer else _send_all)(member, 2)
    member.transport.finish(TIMEOUT_S)


def peers_come_in_any_order(member: Member) -> None:
    """Sender and receiver list their peers such that each waits for another, if one were served at a time."""
    peers = list(member.peers) if (member.rank + member.is_trainer) % 2 else list(member.peers)[::-1]
    pendings = []
    for peer in peers:
        tensor = torch.full((1 << 20,), float(member.rank), device=member.device)
        operation = member.transport.send if member.is_trainer else member.transport.receive
        pendings.append((peer, tensor, operation([Parcel(tensor, peer)])))
    for peer, tensor, pending in pendings:
        pending.wait()
        assert member.is_trainer or bool((tensor == peer).all())
    member.transport.finish(TIMEOUT_S)


def what_stays_is_read_anew_each_time(member: Member) -> None:
    """Other values at the same place, then another place, of which nobody says that it is another."""
    sizes = (7, 1 << 20)
    for round_ in range(6):
        if round_ % 3 == 0:
            tensors = [
                [member.lendable(torch.zeros(size, device=member.device)) for size in sizes] for _ in member.peers
            ]
        for peer, of_peer in zip(member.peers, tensors, strict=True):
            for tensor in of_peer:
                tensor.fill_(100 * round_ + member.rank if member.is_trainer else -1)
            operation = member.transport.send if member.is_trainer else member.transport.receive
            operation([Parcel(tensor, peer, stays=True) for tensor in of_peer]).wait()
        member.transport.finish(TIMEOUT_S)
        for peer, of_peer in zip(member.peers, tensors, strict=True):
            assert member.is_trainer or all(bool((tensor == 100 * round_ + peer).all()) for tensor in of_peer)


def nothing_is_done_at_once(member: Member) -> None:
    member.transport.finish(0.1)
    member.transport.send([]).wait()
    member.transport.receive([]).wait()
    member.transport.finish(0.1)


def _start(member: Member) -> None:
    """Let one small parcel through, so that all is connected, then start a large one that will not get through."""
    large = _large(member)
    _exchange(member)
    member.meet("started")
    operation = member.transport.send if member.is_trainer else member.transport.receive
    operation([Parcel(large, peer) for peer in member.peers])


def _large(member: Member) -> torch.Tensor:
    return torch.ones(LARGE[member.device.type], device=member.device)


def _exchange(member: Member, *, back: bool = False) -> None:
    """Send something small, from trainers to workers or `back`: the first time a direction is used, it is connected."""
    small = torch.ones(3, device=member.device)
    operation = member.transport.send if member.is_trainer != back else member.transport.receive
    operation([Parcel(small, peer) for peer in member.peers]).wait()
    member.transport.finish(TIMEOUT_S)


def _expect(member: Member, error: type[Exception], *, timeout_s: float, within_s: float) -> None:
    began = time.monotonic()
    with pytest.raises(error) as caught:
        member.transport.finish(timeout_s)
    assert time.monotonic() - began < within_s
    assert isinstance(caught.value, TimeoutError) == (error is TimeoutError)
    with pytest.raises(error):  # and it stays broken, rather than to hang at the next use
        member.transport.finish(timeout_s)
    began = time.monotonic()
    member.transport.close()
    assert time.monotonic() - began < within_s


def _send_signal_and_wait(member: Member, name: str, number: signal.Signals) -> None:
    _exchange(member)
    member.meet(name)
    time.sleep(0.5)
    os.kill(os.getpid(), number)


def a_killed_worker_is_an_error_soon(member: Member) -> None:
    if not member.is_trainer:
        _send_signal_and_wait(member, "started", signal.SIGKILL)
    _start(member)
    _expect(member, ConnectionError, timeout_s=TIMEOUT_S, within_s=SOON_S)


def a_killed_trainer_is_an_error_soon(member: Member) -> None:
    if member.is_trainer:
        _send_signal_and_wait(member, "started", signal.SIGKILL)
    _start(member)
    _expect(member, ConnectionError, timeout_s=TIMEOUT_S, within_s=SOON_S)


def a_trainer_killed_in_the_middle_of_a_tensor_is_an_error_soon(member: Member) -> None:
    _start(member)
    if member.is_trainer:
        os.kill(os.getpid(), signal.SIGKILL)
    # On a busy machine the tensor may have been through before the kill; a second one never was. Or the error is there
    # already.
    with suppress(ConnectionError):
        member.transport.receive([Parcel(torch.ones(3, device=member.device), peer) for peer in member.peers])
    _expect(member, ConnectionError, timeout_s=TIMEOUT_S, within_s=SOON_S)


def a_stalled_worker_is_a_time_out(member: Member) -> None:
    if not member.is_trainer:
        _send_signal_and_wait(member, "started", signal.SIGSTOP)
    _start(member)
    _expect(member, TimeoutError, timeout_s=2, within_s=SOON_S)


def an_answer_that_a_stalled_worker_owes_is_a_time_out(member: Member) -> None:
    """The first in its direction: with NCCL it connects, so that `receive` itself takes until it is late."""
    if not member.is_trainer:
        _send_signal_and_wait(member, "started", signal.SIGSTOP)
    _exchange(member)
    member.meet("started")
    time.sleep(2)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        member.transport.receive([Parcel(torch.zeros(3, device=member.device), peer) for peer in member.peers])
        member.transport.finish(2)
    assert time.monotonic() - began < SOON_S
    _expect(member, TimeoutError, timeout_s=2, within_s=SOON_S)


def closing_abandons(member: Member) -> None:
    """Both ends wait for something that nobody sends; one closes."""
    large = _large(member)
    _exchange(member)
    _exchange(member, back=True)  # NCCL blocks the host until both ends connect, which a receiver alone does not
    member.transport.receive([Parcel(large, peer) for peer in member.peers])
    if member.is_trainer:
        began = time.monotonic()
        member.transport.close()
        assert time.monotonic() - began < SOON_S
        with pytest.raises(ConnectionError):
            member.transport.finish(1)
    else:
        _expect(member, ConnectionError, timeout_s=TIMEOUT_S, within_s=SOON_S)
    member.meet("over")


TRANSFERS: tuple[Callable[[Member], None], ...] = (
    values_arrive_bit_for_bit,
    batches_need_not_be_cut_alike,
    workers_send_back,
    peers_come_in_any_order,
    what_stays_is_read_anew_each_time,
    nothing_is_done_at_once,
)
FAILURES: tuple[Callable[[Member], None], ...] = (
    a_killed_worker_is_an_error_soon,
    a_killed_trainer_is_an_error_soon,
    a_trainer_killed_in_the_middle_of_a_tensor_is_an_error_soon,
    a_stalled_worker_is_a_time_out,
    an_answer_that_a_stalled_worker_owes_is_a_time_out,
    closing_abandons,
)
CASES = {case.__name__: case for case in (*TRANSFERS, *FAILURES)}

# Groups of NCCL run in order on one stream, and both ends of a pair must call it with the same messages.
# And a GPU moves a tensor before its process is gone.
NOT_PROMISED_BY_NCCL = (
    batches_need_not_be_cut_alike,
    peers_come_in_any_order,
    a_trainer_killed_in_the_middle_of_a_tensor_is_an_error_soon,
)


def run(
    cases: Sequence[Callable[[Member], None]],
    backend: TestedBackend,
    *,
    trainers: Sequence[str],
    workers: Sequence[str],
    worker_environment: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Run cases with one process per device named, and raise with what a member said if it fails.

    Transfers may follow one another over one transport; a failure is the last case of a run.
    """
    store = host_store(HOST, TIMEOUT_S)
    devices = [*trainers, *workers]
    command = [sys.executable, __file__, ",".join(case.__name__ for case in cases), backend]
    counts = [str(len(trainers)), str(len(workers))]
    processes = [
        subprocess.Popen(
            [*command, str(rank), *counts, device, str(store.port), str(timeout_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **((worker_environment or {}) if rank >= len(trainers) else {})},
        )
        for rank, device in enumerate(devices)
    ]
    lost = range(0)  # who is not meant to end well
    if not {
        a_killed_trainer_is_an_error_soon,
        a_trainer_killed_in_the_middle_of_a_tensor_is_an_error_soon,
    }.isdisjoint(cases):
        lost = range(len(trainers))
    elif not {
        a_killed_worker_is_an_error_soon,
        a_stalled_worker_is_a_time_out,
        an_answer_that_a_stalled_worker_owes_is_a_time_out,
    }.isdisjoint(cases):
        lost = range(len(trainers), len(devices))
    said: dict[int, str] = {}
    try:
        for rank, process in enumerate(processes):
            if rank not in lost:
                with suppress(subprocess.TimeoutExpired):  # it has said where it is stuck, see `_main`
                    said[rank], _ = process.communicate(timeout=2 * LONGEST_S)
    finally:
        for rank, process in enumerate(processes):
            process.kill()
            rest, _ = process.communicate()
            said.setdefault(rank, rest)
            for path in FOLDER.glob(f"shoal-test-{process.pid}-*"):
                path.unlink()
    assert not any(processes[rank].returncode for rank in range(len(devices)) if rank not in lost), said
    assert all(processes[rank].returncode == -signal.SIGKILL for rank in lost)
    for process in processes:  # and nobody leaves anything behind, however it ended
        assert not list(FOLDER.glob(f"shoal-{process.pid}-*"))


def _main(
    names: str, backend: str, rank: str, num_trainers: str, num_workers: str, device: str, port: str, timeout: str
) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(LONGEST_S, exit=False, file=sys.stdout)
    store = join_store(HOST, int(port), TIMEOUT_S)
    timeout_s = float(timeout)
    own, trainers, workers = int(rank), int(num_trainers), int(num_workers)
    if device != "cpu":
        torch.cuda.set_device(device)
    transport: WeightTransport
    memory = HostMemory() if backend == "ipc over host memory" else None
    if memory is not None:
        others = range(trainers, trainers + workers) if own < trainers else range(trainers)
        transport = IpcTransport(
            store,
            rank=own,
            peers=Peers(store, rank=own, others=others, timeout_s=timeout_s),
            peer_ranks=others,
            memory=memory,
            staging_bytes=STAGING_BYTES,
            timeout_s=timeout_s,
        )
    else:
        assert backend in ("gloo", "nccl", "ipc")
        transport = make_transport(
            store,
            backend=backend,  # type: ignore[arg-type]
            rank=own,
            num_trainers=trainers,
            num_workers=workers,
            host=HOST,
            device=torch.device(device),
            timeout_s=timeout_s,
            staging_bytes=STAGING_BYTES,
        )
    member = Member(
        transport=transport,
        store=store,
        rank=own,
        num_trainers=trainers,
        num_workers=workers,
        device=torch.device(device),
        memory=memory,
    )
    for name in names.split(","):
        print(name, flush=True)
        CASES[name](member)
        if CASES[name] in TRANSFERS:
            member.meet(f"end of {name}")
    transport.close()
    # A thread of Gloo that still waits for the one that was lost would abort the interpreter's own end.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
