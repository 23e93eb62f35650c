"""Parcels between processes of one host that open each other's GPU memory: CUDA IPC.

For engine workers on the trainer's own GPU, which NCCL refuses, and on GPUs that can reach it. The receiver copies
parcels from where they lie, and lets go of that memory before the sender hears that all was read, unless it stays from
transfer to transfer; those that it cannot open go through a ring of the sender's memory. What is said between them goes
through a page of host memory.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from shoal.protocols import Parcel, Pending
from shoal.wire.device_memory import SharedMemory
from shoal.wire.liveness import GoneError, LateError, Peers, patience_left
from shoal.wire.rendezvous import Store
from shoal.wire.ring import ALIGNMENT, Batch, Piece, RingReader, RingWriter, Signals

_LIVENESS_PERIOD_S = 0.2
_SPIN_S = 200e-6  # how long a caller that waits does not sleep: waking takes as long as half a batch
_GLANCE_S = 20e-6  # between two looks after that
_SLEEP_S = 500e-6  # of the thread, which takes lock and interpreter from callers that have other work
_JOIN_S = 5.0


class IpcTransport:
    """Parcels that all peers are served with in turn: by whoever calls, as far as it goes at once, and by a thread.

    Args:
        store: Where the members meet.
        rank: Of this member.
        peers: The members that this one exchanges with.
        peer_ranks: Their ranks.
        memory: Of this member's GPU.
        staging_bytes: Bound on this member's staging buffers, over all peers.
        timeout_s: For meeting, and for `Pending.wait`.

    Raises:
        ConfigError: A peer's memory cannot be opened here.
        torch.distributed.DistStoreError: A peer did not come in time.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        peers: Peers,
        peer_ranks: Sequence[int],
        memory: SharedMemory,
        staging_bytes: int,
        timeout_s: float,
    ) -> None:
        self._peers = peers
        self._memory = memory
        self._timeout_s = timeout_s
        self._writers: dict[int, RingWriter] = {}
        self._readers: dict[int, RingReader] = {}
        self._changed = threading.Condition()
        self._num_movers = 0  # callers that wait, and move what they wait for
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="weight-ipc")
        try:
            num_bytes = staging_bytes // len(peer_ranks) // (2 * ALIGNMENT) * 2 * ALIGNMENT
            for peer in peer_ranks:
                self._writers[peer] = self._offer(store, rank, peer, max(num_bytes, 2 * ALIGNMENT))
            for peer in peer_ranks:
                self._readers[peer] = self._accept(store, rank, peer)
            # Only now may any of us leave: what a member gives up must have been taken up by all who were told of it.
            opened = [f"opened/{rank}/{peer}" for peer in peer_ranks]
            store.wait(opened, timedelta(seconds=timeout_s))
        except BaseException:
            self._release()
            raise
        self._thread.start()

    def send(self, parcels: Sequence[Parcel]) -> Pending:
        """Start sending, after what the current stream does so far."""
        return self._add(parcels, self._writers)

    def receive(self, parcels: Sequence[Parcel]) -> Pending:
        """Start receiving, after what the current stream does so far."""
        return self._add(parcels, self._readers)

    def finish(self, timeout_s: float) -> None:
        """Block until all that was started is done, at the receivers too."""
        with self._changed:
            done = self._move_until(lambda: not self._busy(), timeout_s)
            if self._failure is not None:
                raise self._failure
            if not done:
                self._fail(self._late(timeout_s))
                raise self._failure or AssertionError
            for end in self._ends():
                end.end_transfer()

    def close(self) -> None:
        """Leave, and give back the memory."""
        with self._changed:
            self._fail(ConnectionError("the transport is closed"))
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)
        if not self._thread.is_alive():  # else the GPU hangs in a copy, and the memory is not ours to free
            self._release()

    def wait_for(self, batch: Batch) -> None:
        """Block until a batch is through."""
        with self._changed:
            patience_s = patience_left(batch.posted, self._timeout_s)
            done = self._move_until(lambda: not batch.num_open, patience_s)
            if batch.num_open and self._failure is not None:
                raise self._failure
            if not done:
                raise self._late(self._timeout_s)

    def _offer(self, store: Store, rank: int, peer: int, num_bytes: int) -> RingWriter:
        """Tell a peer how it is to be sent to."""
        signals = Signals.create()
        offer = {"device": self._memory.name, "num_bytes": num_bytes, "signals": str(signals.path)}
        store.set(f"ring/{rank}/{peer}", json.dumps(offer))
        return RingWriter(peer=peer, memory=self._memory, num_bytes=num_bytes, signals=signals)

    def _accept(self, store: Store, rank: int, peer: int) -> RingReader:
        """Take up what a peer has told."""
        key = f"ring/{peer}/{rank}"
        store.wait([key], timedelta(seconds=self._timeout_s))
        offer = json.loads(store.get(key))
        store.delete_key(key)
        signals = Signals(Path(offer["signals"]), create=False)
        signals.unlink()  # both have it now, and nothing stays behind however they end
        self._memory.check_reach(offer["device"])
        store.set(f"opened/{peer}/{rank}", "")
        return RingReader(peer=peer, memory=self._memory, num_bytes=int(offer["num_bytes"]), signals=signals)

    def _add(self, parcels: Sequence[Parcel], ends: dict[int, RingWriter] | dict[int, RingReader]) -> Pending:
        filled = [parcel for parcel in parcels if parcel.tensor.numel()]
        for parcel in filled:
            if not parcel.tensor.is_contiguous():
                raise ValueError(f"a parcel must be contiguous, not of strides {parcel.tensor.stride()}")
        batch = Batch(self._memory.mark(), len(filled))
        with self._changed:
            if self._failure is not None:
                raise self._failure
            for parcel in filled:
                ends[parcel.peer].add(Piece(parcel.tensor, batch, stays=parcel.stays))
            while self._move():
                pass
            self._changed.notify_all()
        return _IpcBatch(self, batch)

    def _run(self) -> None:
        """Move what can be moved, and look after the peers."""
        next_look = 0.0
        try:
            while True:
                with self._changed:
                    if self._failure is not None:
                        return
                    if not self._num_movers:
                        self._move()
                    busy = self._busy()
                    if not busy:
                        self._changed.wait(1.0)
                        continue
                if time.monotonic() >= next_look:
                    self._look_after(busy)
                    next_look = time.monotonic() + _LIVENESS_PERIOD_S
                time.sleep(_SLEEP_S)
        except Exception as error:
            with self._changed:
                self._fail(error)

    def _move(self) -> bool:
        """Do what can be done without waiting. Returns whether anything was. The lock must be held."""
        try:
            progress = [end.step() for end in self._ends()]
            return any(progress)
        except Exception as error:
            self._fail(error)
            raise

    def _move_until(self, is_done: Callable[[], bool], patience_s: float) -> bool:
        """Move until something is so; return whether it came to be. Ends early with a failure. The lock must be held.

        The caller does it itself: it would wait for milliseconds for the thread to get the interpreter in between.
        """
        moved = time.monotonic()
        deadline = moved + patience_s
        self._num_movers += 1
        try:
            while self._failure is None and not is_done():
                if self._move():
                    moved = time.monotonic()
                    continue
                now = time.monotonic()
                if now >= deadline:
                    break
                if now - moved < _SPIN_S:
                    time.sleep(0)
                else:
                    self._changed.wait(_GLANCE_S)
        finally:
            self._num_movers -= 1
        return is_done()

    def _look_after(self, busy: list[RingWriter | RingReader]) -> None:
        self._peers.check_alive({end.peer for end in busy})
        for end in busy:
            # In this order: a peer that has read the last bytes may leave at once.
            if end.peer_left() and not end.is_idle():
                raise GoneError(f"member {end.peer} has left the weight transfer", end.peer)

    def _late(self, timeout_s: float) -> LateError:
        members = sorted({end.peer for end in self._busy()})
        return LateError(f"a transfer of weights over CUDA IPC took more than {timeout_s:g} s", members)

    def _ends(self) -> list[RingWriter | RingReader]:
        return [*self._writers.values(), *self._readers.values()]

    def _busy(self) -> list[RingWriter | RingReader]:
        return [end for end in self._ends() if not end.is_idle()]

    def _fail(self, error: Exception) -> None:
        """Record the first failure, tell the peers at once, and wake whoever waits."""
        if self._failure is None:
            self._failure = error
            for end in self._ends():
                end.leave()
        self._changed.notify_all()

    def _release(self) -> None:
        writers, self._writers = self._writers, {}
        readers, self._readers = self._readers, {}
        for reader in readers.values():
            reader.leave()
            reader.shut()
        for writer in writers.values():
            writer.leave()
            writer.signals.unlink()
            writer.release()


class _IpcBatch:
    def __init__(self, transport: IpcTransport, batch: Batch) -> None:
        self._transport = transport
        self._batch = batch

    def wait(self) -> None:
        """Block until the parcels are copied: out of the way at the sender, in place at the receiver."""
        self._transport.wait_for(self._batch)
