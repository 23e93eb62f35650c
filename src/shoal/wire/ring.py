"""A ring of bytes between two processes: one writes, one reads, and each tells the other how far it came.

Parcels lie in the ring one after another as a stream without end; both ends list them in the same order and know their
sizes, so nothing but two positions has to be said. Positions count bytes of the stream and only grow.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shoal.wire.device_memory import Copy, Moment, SharedMemory

ALIGNMENT = 512
_WORDS_PER_LINE = 16  # two cache lines of 8-byte words: the two ends never write to the same one
_WRITTEN, _READ, _WRITER_LEFT, _READER_LEFT = (index * _WORDS_PER_LINE for index in range(4))


class Signals:
    """The two positions, in a page of the host's memory that both processes map."""

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0), 0o600)
        try:
            if create:
                os.ftruncate(descriptor, mmap.PAGESIZE)
            self._page = mmap.mmap(descriptor, mmap.PAGESIZE)
        finally:
            os.close(descriptor)
        # Stores through a cast view are one machine word each; `struct` would write byte by byte.
        self._words = memoryview(self._page).cast("q")

    @classmethod
    def create(cls) -> Signals:
        """Make a page under a new name, in memory where the system has such a folder."""
        folder = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
        return cls(Path(folder) / f"shoal-{os.getpid()}-{os.urandom(8).hex()}", create=True)

    def unlink(self) -> None:
        """Remove the name; the mappings stay."""
        self.path.unlink(missing_ok=True)

    def __getitem__(self, word: int) -> int:
        return self._words[word]

    def __setitem__(self, word: int, value: int) -> None:
        self._words[word] = value


@dataclass(slots=True)
class Batch:
    """Parcels of one call.

    Attributes:
        after: The point in the order of the device's work that they come after.
        num_open: How many of them are not through the device's copy yet.
        posted: When the call was, by the monotonic clock.
    """

    after: Moment
    num_open: int
    posted: float = field(default_factory=time.monotonic)


class Piece:
    """One parcel in a ring's queue.

    Args:
        tensor: What it carries.
        batch: Its call.
    """

    __slots__ = ("address", "batch", "memory", "num_bytes", "num_done", "tensor")

    def __init__(self, tensor: torch.Tensor, batch: Batch) -> None:
        self.tensor = tensor  # stays alive until it is copied
        self.batch = batch
        self.address = tensor.data_ptr()
        self.memory = tensor.untyped_storage().data_ptr()
        self.num_bytes = tensor.nbytes
        self.num_done = 0


@dataclass(slots=True)
class _Burst:
    """Copies under way together."""

    done: Moment
    finished: list[Piece] = field(default_factory=list)


class RingEnd:
    """What both ends of a ring do: take bytes of the queued parcels in turn.

    Args:
        peer: Rank of the member at the other end.
        memory: Copies.
        address: Of the ring here.
        num_bytes: Of the ring, a multiple of two alignments.
        signals: The page shared with the other end.
    """

    _writes: bool
    """Whether copies go into the ring."""

    def __init__(self, *, peer: int, memory: SharedMemory, address: int, num_bytes: int, signals: Signals) -> None:
        self.peer = peer
        self.address = address
        self.signals = signals
        self._memory = memory
        self._num_bytes = num_bytes
        self._queue: deque[Piece] = deque()
        self._queued_bytes = 0  # with the padding between parcels
        self._position = 0
        self._burst: _Burst | None = None

    def add(self, piece: Piece) -> None:
        """Put a parcel at the end of the queue."""
        self._queue.append(piece)
        self._queued_bytes += _round_up(piece.num_bytes)

    def is_idle(self) -> bool:
        """Whether nothing is left to do, at either end."""
        return not self._queue and self._burst is None

    def _start(self, budget: int) -> bool:
        """Start copying up to `budget` bytes of the stream."""
        copies: list[Copy] = []
        batches: list[Batch] = []
        finished: list[Piece] = []
        end = self._position + budget
        # Where the last copy ends: what follows on in both places is one copy with it, unless it lies in other memory,
        # which may be another allocation of the device that begins just there.
        last = (0, 0, 0)
        while self._queue and self._position < end:
            piece = self._queue[0]
            offset = self._position % self._num_bytes
            count = min(piece.num_bytes - piece.num_done, end - self._position, self._num_bytes - offset)
            ring, own = self.address + offset, piece.address + piece.num_done
            if (ring, own, piece.memory) == last:
                target, source, former = copies[-1]
                copies[-1] = (target, source, former + count)
            else:
                copies.append((ring, own, count) if self._writes else (own, ring, count))
            last = (ring + count, own + count, piece.memory)
            if not batches or batches[-1] is not piece.batch:
                batches.append(piece.batch)
            piece.num_done += count
            self._position += count
            if piece.num_done == piece.num_bytes:
                self._position = _round_up(self._position)
                self._queued_bytes -= _round_up(piece.num_bytes)
                finished.append(self._queue.popleft())
        if not copies:
            return False
        self._burst = _Burst(self._memory.copy(copies, [batch.after for batch in batches]), finished)
        return True

    def _end_burst(self) -> bool:
        """Take note of copies that are done. Returns whether there are any."""
        if self._burst is None or not self._burst.done.query():
            return False
        for piece in self._burst.finished:
            piece.batch.num_open -= 1
        self._burst = None
        return True


class RingWriter(RingEnd):
    """The sender's end. It fills half of the ring while the other half is read."""

    _writes = True

    def is_idle(self) -> bool:
        """Whether all was written and read."""
        return super().is_idle() and self.signals[_READ] == self._position

    def peer_left(self) -> bool:
        """Whether the reader closed its end."""
        return bool(self.signals[_READER_LEFT])

    def leave(self) -> None:
        """Tell the reader that nothing will come any more."""
        self.signals[_WRITER_LEFT] = 1

    def step(self) -> bool:
        """Do what can be done without waiting. Returns whether anything was."""
        progress = self._end_burst()
        if progress:
            self.signals[_WRITTEN] = self._position
        if self._burst is None and self._queue:
            half = self._num_bytes // 2
            budget = min(self._num_bytes - (self._position - self.signals[_READ]), half)
            # Half a ring, or all there is: many small bursts would cost more than they move.
            if budget == half or budget >= self._queued_bytes:
                progress |= self._start(budget)
        return progress


class RingReader(RingEnd):
    """The receiver's end."""

    _writes = False

    def peer_left(self) -> bool:
        """Whether the writer closed its end."""
        return bool(self.signals[_WRITER_LEFT])

    def leave(self) -> None:
        """Tell the writer that nobody reads any more."""
        self.signals[_READER_LEFT] = 1

    def step(self) -> bool:
        """Do what can be done without waiting. Returns whether anything was."""
        progress = self._end_burst()
        if progress:
            self.signals[_READ] = self._position
        if self._burst is None and self._queue:
            budget = self.signals[_WRITTEN] - self._position
            progress |= self._start(budget)
        return progress


def _round_up(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
