"""A line of parcels between two processes of one host: one writes, one reads, and each says how far it came.

Both ends list the parcels in the same order and know their sizes. A parcel stays where it lies, and the reader copies
it from there: the writer *lends* it. Those in memory that no other process can open are copied into a ring of staging
memory, made when the first one comes, one after another as a stream without end, and out of it again. In a page of the
host's memory the writer notes what comes next, so many bytes of the stream or one lent parcel and where it lies, and
the reader how far it is. All these counts only grow.

Opening and closing memory takes longer than copying it. Of parcels that stay where they are from transfer to transfer
the reader keeps it open. Memory must not be freed while somebody has it open, so the writer holds on to such parcels
until the reader has let go: at the end of the first transfer without them.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shoal.wire.device_memory import HANDLE_BYTES, Copy, Moment, SharedMemory

ALIGNMENT = 512
_NUM_NOTES = 2048
_LENT_PER_BURST = 32  # the next burst's memory is opened while those of the last one are copied
_NUM_BURSTS = 8  # of a reader, under way at once
_NOTE = struct.Struct(f"<QQQ{HANDLE_BYTES}s")
"""What comes next. In the stream: how many bytes, 0, 0, the ring's handle. Lent: 0, if it stays, where, and in what."""

_WORDS_PER_LINE = 16  # two cache lines of 8-byte words: the two ends never write to the same one
_WRITTEN, _READ, _WRITER_LEFT, _READER_LEFT = (index * _WORDS_PER_LINE for index in range(4))
_NOTES_READ = _READ + 1
_FIRST_NOTE = 4 * _WORDS_PER_LINE * 8
_PAGE_BYTES = _FIRST_NOTE + _NUM_NOTES * _NOTE.size


class Signals:
    """What the two ends tell each other, in a piece of the host's memory that both processes map.

    Args:
        path: Name of that memory.
        create: Whether it is made.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0), 0o600)
        try:
            if create:
                os.ftruncate(descriptor, _PAGE_BYTES)
            self._page = mmap.mmap(descriptor, _PAGE_BYTES)
        finally:
            os.close(descriptor)
        # Stores through a cast view are one machine word each; `struct` would write byte by byte.
        self._words = memoryview(self._page)[:_FIRST_NOTE].cast("q")

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

    def note(self, number: int) -> tuple[int, bool, int, bytes]:
        """Return what comes next, as `set_note` was told."""
        count, stays, offset, handle = _NOTE.unpack_from(self._page, _FIRST_NOTE + number % _NUM_NOTES * _NOTE.size)
        return count, bool(stays), offset, handle

    def set_note(self, number: int, count: int, stays: bool = False, offset: int = 0, handle: bytes = b"") -> None:
        """Write what comes next (see `_NOTE`). It means something once the number of those written says so."""
        _NOTE.pack_into(self._page, _FIRST_NOTE + number % _NUM_NOTES * _NOTE.size, count, stays, offset, handle)


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
        stays: Whether it will lie there in later transfers too.

    Attributes:
        lent: If the reader is to copy it from where it lies: the allocation's handle, and where it begins in there.
    """

    __slots__ = ("address", "batch", "lent", "memory", "num_bytes", "num_done", "stays", "tensor")

    def __init__(self, tensor: torch.Tensor, batch: Batch, *, stays: bool = False) -> None:
        self.lent: tuple[bytes, int] | None = None
        self.stays = stays
        self.tensor = tensor  # stays alive until it is copied
        self.batch = batch
        self.address = tensor.data_ptr()
        self.memory = tensor.untyped_storage().data_ptr()
        self.num_bytes = tensor.nbytes
        self.num_done = 0


class _Copies:
    """Copies to be made together. What follows on in both places is one copy."""

    def __init__(self) -> None:
        self.all: list[Copy] = []
        self._end: tuple[int, int, object] = (0, 0, None)

    def add(self, target: int, source: int, num_bytes: int, memory: object) -> None:
        """Add a copy. One that goes on in another `memory` is apart: the device refuses to copy across allocations."""
        if (target, source, memory) == self._end:
            first_target, first_source, former = self.all[-1]
            self.all[-1] = (first_target, first_source, former + num_bytes)
        else:
            self.all.append((target, source, num_bytes))
        self._end = (target + num_bytes, source + num_bytes, memory)


@dataclass(slots=True)
class _Burst:
    """Copies under way together.

    Attributes:
        done: When they are.
        finished: Parcels that are through then.
        position: In the stream, then.
        num_notes: That are done with then.
    """

    done: Moment
    finished: list[Piece]
    position: int
    num_notes: int


class RingEnd:
    """What both ends do: take the queued parcels in turn.

    Args:
        peer: Rank of the member at the other end.
        memory: Copies.
        num_bytes: Of the ring, a multiple of two alignments.
        signals: The page shared with the other end.

    Attributes:
        address: Of the ring here; None before it is needed.
    """

    _writes: bool
    """Whether copies go into the ring."""

    def __init__(self, *, peer: int, memory: SharedMemory, num_bytes: int, signals: Signals) -> None:
        self.peer = peer
        self.address: int | None = None
        self.signals = signals
        self._memory = memory
        self._num_bytes = num_bytes
        self._queue: deque[Piece] = deque()
        self._position = 0  # in the stream
        self._num_notes = 0
        self._bursts: deque[_Burst] = deque()

    def add(self, piece: Piece) -> None:
        """Put a parcel at the end of the queue."""
        self._queue.append(piece)

    def is_idle(self) -> bool:
        """Whether nothing is left to do, at either end."""
        return not self._queue and not self._bursts

    def _stream(self, copies: _Copies, batches: list[Batch], finished: list[Piece], end: int) -> None:
        """Take what goes through the ring from the head of the queue, up to a position of the stream."""
        assert self.address is not None, "there is a ring by the time that something goes through it"
        while self._queue and self._position < end and self._queue[0].lent is None:
            piece = self._queue[0]
            offset = self._position % self._num_bytes
            count = min(piece.num_bytes - piece.num_done, end - self._position, self._num_bytes - offset)
            ring, own = self.address + offset, piece.address + piece.num_done
            copies.add(*((ring, own) if self._writes else (own, ring)), count, piece.memory)
            _come_after(batches, piece)
            piece.num_done += count
            self._position += count
            if piece.num_done == piece.num_bytes:
                self._position = _round_up(self._position)
                finished.append(self._queue.popleft())

    def _begin(self, copies: _Copies, batches: list[Batch], finished: list[Piece], num_notes: int) -> None:
        """Start copying."""
        done = self._memory.copy(copies.all, [batch.after for batch in batches])
        self._bursts.append(_Burst(done, finished, self._position, num_notes))

    def _passed(self) -> _Burst | None:
        """Return the oldest burst if it is done, and count its parcels."""
        if not self._bursts or not self._bursts[0].done.query():
            return None
        burst = self._bursts.popleft()
        for piece in burst.finished:
            piece.batch.num_open -= 1
        return burst


class RingWriter(RingEnd):
    """The sender's end. It fills half of the ring while the other half is read."""

    _writes = True

    def __init__(self, *, peer: int, memory: SharedMemory, num_bytes: int, signals: Signals) -> None:
        super().__init__(peer=peer, memory=memory, num_bytes=num_bytes, signals=signals)
        self._handle = b""
        self._queued_bytes = 0  # for the ring, with the padding between parcels
        self._lent: deque[tuple[int, Piece]] = deque()  # with the number of its note, oldest first
        # Of this transfer and the last two: the reader ends each one, and lets go, after we have ended it.
        self._kept: deque[list[torch.Tensor]] = deque([[]], maxlen=3)

    def add(self, piece: Piece) -> None:
        """Put a parcel at the end of the queue, lent if it can be."""
        piece.lent = self._memory.export(piece.address)
        super().add(piece)
        if piece.lent is None:
            self._queued_bytes += _round_up(piece.num_bytes)
        elif piece.stays:
            self._kept[-1].append(piece.tensor)

    def is_idle(self) -> bool:
        """Whether all was written and read."""
        return super().is_idle() and not self._lent and self.signals[_READ] == self._position

    def end_transfer(self) -> None:
        """Say that a whole transfer is over."""
        self._kept.append([])

    def peer_left(self) -> bool:
        """Whether the reader closed its end."""
        return bool(self.signals[_READER_LEFT])

    def leave(self) -> None:
        """Tell the reader that nothing will come any more."""
        self.signals[_WRITER_LEFT] = 1

    def release(self) -> None:
        """Give the ring back."""
        if self.address is not None:
            self._memory.release(self.address)
            self.address = None

    def step(self) -> bool:
        """Do what can be done without waiting. Returns whether anything was."""
        progress = False
        if burst := self._passed():
            self.signals[_WRITTEN] = burst.num_notes
            progress = True
        num_read = self.signals[_NOTES_READ]
        while self._lent and self._lent[0][0] < num_read:
            self._lent.popleft()[1].batch.num_open -= 1
            progress = True
        if not self._bursts and self._queue:
            progress |= self._start(_NUM_NOTES - (self._num_notes - num_read))
        return progress

    def _start(self, num_notes: int) -> bool:
        """Start on what is queued, as far as the ring and so many notes go."""
        half = self._num_bytes // 2
        budget = min(self._num_bytes - (self._position - self.signals[_READ]), half)
        # Half a ring, or all there is: many small bursts would cost more than they move.
        end = self._position + (budget if budget == half or budget >= self._queued_bytes else 0)
        last_note = self._num_notes + num_notes
        copies, batches, finished = _Copies(), list[Batch](), list[Piece]()
        first_note = self._num_notes
        while self._queue and self._num_notes < last_note:
            piece = self._queue[0]
            if piece.lent is not None:
                handle, offset = piece.lent
                self.signals.set_note(self._num_notes, 0, piece.stays, offset, handle)
                self._lent.append((self._num_notes, piece))
                self._queue.popleft()
                _come_after(batches, piece)
            else:
                if self.address is None:
                    self.address, self._handle = self._memory.allocate(self._num_bytes)
                before = self._position
                self._stream(copies, batches, finished, end)
                if self._position == before:
                    break
                self.signals.set_note(self._num_notes, self._position - before, handle=self._handle)
                self._queued_bytes -= self._position - before
            self._num_notes += 1
        if self._num_notes == first_note:
            return False
        self._begin(copies, batches, finished, self._num_notes)
        return True


class RingReader(RingEnd):
    """The receiver's end."""

    _writes = False

    def __init__(self, *, peer: int, memory: SharedMemory, num_bytes: int, signals: Signals) -> None:
        super().__init__(peer=peer, memory=memory, num_bytes=num_bytes, signals=signals)
        self._opened: dict[bytes, int] = {}
        self._kept: dict[bytes, int] = {}
        self._missed: set[bytes] = set()  # of those kept open, what this transfer had no use for yet
        self._end = 0  # of the stream, as far as the notes say that were taken up

    def peer_left(self) -> bool:
        """Whether the writer closed its end."""
        return bool(self.signals[_WRITER_LEFT])

    def leave(self) -> None:
        """Tell the writer that nobody reads any more."""
        self.signals[_READER_LEFT] = 1

    def end_transfer(self) -> None:
        """Say that a whole transfer is over, and let go of memory that was kept open and is not used any more."""
        for handle in self._missed:
            self._memory.shut(self._kept.pop(handle))
        self._missed = set(self._kept)

    def shut(self) -> None:
        """Let go of all memory of the writer's."""
        self._shut_passing()
        if self.address is not None:
            self._memory.shut(self.address)
            self.address = None
        while self._kept:
            self._memory.shut(self._kept.popitem()[1])
        self._missed.clear()

    def _shut_passing(self) -> None:
        while self._opened:
            self._memory.shut(self._opened.popitem()[1])

    def step(self) -> bool:
        """Do what can be done without waiting. Returns whether anything was."""
        progress = False
        if burst := self._passed():
            if self.is_idle():
                # Before the writer hears that all was read: from then on it may give its memory back.
                self._shut_passing()
            self.signals[_READ] = burst.position
            self.signals[_NOTES_READ] = burst.num_notes
            progress = True
        if self._queue and len(self._bursts) < _NUM_BURSTS:
            progress |= self._start(self.signals[_WRITTEN])
        return progress

    def _start(self, num_written: int) -> bool:
        """Start on what was written and is expected here."""
        copies, batches, finished = _Copies(), list[Batch](), list[Piece]()
        last_note = min(num_written, self._num_notes + _LENT_PER_BURST)
        while self._queue:
            if self._position == self._end:
                if self._num_notes == last_note:
                    break
                count, stays, offset, handle = self.signals.note(self._num_notes)
                self._num_notes += 1
                if not count:
                    piece = self._queue.popleft()
                    source = self._open(handle, stays) + offset
                    copies.add(piece.address, source, piece.num_bytes, (piece.memory, handle))
                    _come_after(batches, piece)
                    finished.append(piece)
                    continue
                if self.address is None:
                    self.address = self._memory.open_handle(handle)
                self._end += count
            self._stream(copies, batches, finished, self._end)
        if not copies.all:
            return False
        self._begin(copies, batches, finished, self._num_notes - (self._position < self._end))
        return True

    def _open(self, handle: bytes, stays: bool) -> int:
        if stays:
            self._missed.discard(handle)
            if handle in self._opened:
                self._kept[handle] = self._opened.pop(handle)
        for known in (self._kept, self._opened):
            if handle in known:
                return known[handle]
        address = self._memory.open_handle(handle)
        (self._kept if stays else self._opened)[handle] = address
        return address


def _come_after(batches: list[Batch], piece: Piece) -> None:
    if not batches or batches[-1] is not piece.batch:
        batches.append(piece.batch)


def _round_up(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
