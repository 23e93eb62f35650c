"""Which copies a ring makes of the parcels in its queue."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch

from shoal.wire.device_memory import Copy
from shoal.wire.ring import ALIGNMENT, Batch, Piece, RingReader, RingWriter, Signals

RING = 1 << 40  # an address that nothing is read from
LENT = 1 << 50  # where the reader finds what was lent
NUM_BYTES = 1 << 20
RING_HANDLE = b"the ring".ljust(64, b"\0")


class Memory:
    """Notes what is to be copied, and is done at once."""

    def __init__(self, *, exports: bool = False) -> None:
        self.copies: list[Copy] = []
        self.exports = exports
        self.opened: list[bytes] = []
        self.num_rings = 0

    def allocate(self, num_bytes: int) -> tuple[int, bytes]:
        self.num_rings += 1
        return RING, RING_HANDLE

    def export(self, address: int) -> tuple[bytes, int] | None:
        return (b"%064x" % (address >> 12), address % (1 << 12)) if self.exports else None

    def open_handle(self, handle: bytes) -> int:
        if handle == RING_HANDLE:
            return 2 * RING
        self.opened.append(handle)
        return LENT + (int(handle, 16) << 12)

    def shut(self, address: int) -> None:
        self.opened.remove(b"%064x" % ((address - LENT) >> 12))

    def copy(self, copies: Sequence[Copy], after: Sequence[object]) -> Memory:
        self.copies += copies
        return self

    def query(self) -> bool:
        return True


@pytest.fixture
def signals() -> Iterator[Signals]:
    page = Signals.create()
    yield page
    page.unlink()


def writer_of(memory: Memory, signals: Signals, num_bytes: int = 64 * ALIGNMENT) -> RingWriter:
    return RingWriter(peer=1, memory=memory, num_bytes=num_bytes, signals=signals)  # type: ignore[arg-type]


def add(end: RingWriter | RingReader, memory: Memory, *tensors: torch.Tensor, stays: bool = False) -> Batch:
    batch = Batch(memory, len(tensors))
    for tensor in tensors:
        end.add(Piece(tensor, batch, stays=stays))
    return batch


def test_parcels_that_follow_one_another_in_one_memory_are_one_copy(signals: Signals) -> None:
    memory, whole = Memory(), torch.empty(3 * ALIGNMENT, dtype=torch.uint8)
    writer = writer_of(memory, signals)
    batch = add(writer, memory, *whole.split(ALIGNMENT))
    writer.step()
    assert memory.copies == [(RING, whole.data_ptr(), whole.nbytes)]
    writer.step()
    assert batch.num_open == 0


def test_parcels_of_different_memories_are_copied_apart_though_one_begins_where_the_other_ends(
    signals: Signals,
) -> None:
    """On a device these may be two allocations, and a copy that crosses from one to the other is refused."""
    memory, whole = Memory(), torch.empty(2 * ALIGNMENT, dtype=torch.uint8)
    first, second = whole.split(ALIGNMENT)
    writer = writer_of(memory, signals)
    batch = Batch(memory, 2)
    pieces = [Piece(first, batch), Piece(second, batch)]
    pieces[1].memory += ALIGNMENT
    for piece in pieces:
        writer.add(piece)
    writer.step()
    assert memory.copies == [(RING, first.data_ptr(), ALIGNMENT), (RING + ALIGNMENT, second.data_ptr(), ALIGNMENT)]


def test_a_gap_on_either_side_keeps_copies_apart(signals: Signals) -> None:
    memory, whole = Memory(), torch.empty(4 * ALIGNMENT, dtype=torch.uint8)
    writer = writer_of(memory, signals)
    short = whole[: ALIGNMENT - 1]  # the next one begins on the next line of the ring
    add(writer, memory, short, whole[ALIGNMENT - 1 : ALIGNMENT + 9], whole[3 * ALIGNMENT :])
    writer.step()
    assert [count for _, _, count in memory.copies] == [ALIGNMENT - 1, 10, ALIGNMENT]


def test_the_reader_copies_out_of_the_ring_what_the_writer_has_put_there(signals: Signals) -> None:
    memory, source, target = Memory(), torch.empty(ALIGNMENT), torch.empty(ALIGNMENT)
    writer = writer_of(memory, signals)
    add(writer, memory, source)
    reader = RingReader(peer=0, memory=memory, num_bytes=64 * ALIGNMENT, signals=signals)  # type: ignore[arg-type]
    batch = add(reader, memory, target)
    assert not reader.step()  # nothing is there yet
    for _ in range(2):
        writer.step()
    for _ in range(2):
        reader.step()
    assert memory.copies == [(RING, source.data_ptr(), source.nbytes), (target.data_ptr(), 2 * RING, source.nbytes)]
    assert memory.num_rings == 1 and batch.num_open == 0 and writer.is_idle() and reader.is_idle()


def ends_of(writer: Memory, reader: Memory, signals: Signals, num_bytes: int) -> tuple[RingWriter, RingReader]:
    read = RingReader(peer=0, memory=reader, num_bytes=num_bytes, signals=signals)  # type: ignore[arg-type]
    return writer_of(writer, signals, num_bytes), read


def test_a_parcel_is_read_where_it_lies_and_let_go_of_before_the_writer_hears_that_it_was_read(
    signals: Signals,
) -> None:
    own, other = Memory(exports=True), Memory()
    writer, reader = ends_of(own, other, signals, 64 * ALIGNMENT)
    whole = torch.empty(NUM_BYTES + 8, dtype=torch.uint8)
    source, target = whole[8:], torch.empty(NUM_BYTES, dtype=torch.uint8)
    sent, received = add(writer, own, source), add(reader, other, target)
    writer.step()
    assert not reader.step()  # what comes before it on the device may not be done yet
    writer.step()
    reader.step()
    assert own.copies == [] and other.copies == [(target.data_ptr(), LENT + source.data_ptr(), NUM_BYTES)]
    assert len(other.opened) == 1 and sent.num_open == received.num_open == 1
    reader.step()
    assert not other.opened and received.num_open == 0
    assert not writer.is_idle() and sent.num_open == 1  # a tensor that was lent may not change before this
    writer.step()
    assert writer.is_idle() and reader.is_idle() and sent.num_open == 0 and not own.num_rings


def test_memory_that_stays_is_kept_open_and_alive_until_a_transfer_goes_by_without_it(signals: Signals) -> None:
    own, other = Memory(exports=True), Memory()
    writer, reader = ends_of(own, other, signals, 64 * ALIGNMENT)
    target = torch.empty(NUM_BYTES, dtype=torch.uint8)

    def transfer(source: torch.Tensor, *, stays: bool) -> list[bytes]:
        before = list(other.opened)
        add(writer, own, source, stays=stays)
        add(reader, other, target)
        while writer.step() | reader.step():
            pass
        assert writer.is_idle() and reader.is_idle()
        # The writer's end comes first: it must not free yet what the reader still has open.
        writer.end_transfer()
        reader.end_transfer()
        return [handle for handle in other.opened if handle not in before]

    def is_alive(source: weakref.ref[torch.UntypedStorage]) -> bool:
        gc.collect()
        return source() is not None

    first, second = (torch.empty(NUM_BYTES, dtype=torch.uint8) for _ in range(2))
    lent = weakref.ref(first.untyped_storage())
    (kept,) = transfer(first, stays=True)
    assert not transfer(first, stays=True) and other.opened == [kept]  # opened once
    assert not transfer(first, stays=False) and not other.opened
    assert not transfer(second, stays=False) and not other.opened
    (kept,) = transfer(first, stays=True)
    del first
    assert is_alive(lent)
    (another,) = transfer(second, stays=True)
    assert other.opened == [another] and is_alive(lent)
    transfer(second, stays=True)
    assert not is_alive(lent)
    reader.shut()
    assert not other.opened


@pytest.mark.parametrize("exports", [True, False])
def test_many_parcels_of_all_sizes_keep_their_order(signals: Signals, exports: bool) -> None:
    """More lent ones than there is room for notes, small ones between them, and a ring that goes round."""
    own, other = Memory(exports=exports), Memory()
    writer, reader = ends_of(own, other, signals, 4 * ALIGNMENT)
    large = torch.empty(NUM_BYTES + 5000, dtype=torch.uint8)
    small = torch.empty(3000, dtype=torch.uint8)
    num_parcels = 5000 if exports else 60
    sources = [
        large[index : index + NUM_BYTES] if index % 3 else small[: 1 + index % 3000] for index in range(num_parcels)
    ]
    sent = add(writer, own, *sources)
    # What is copied where is only written down, so one tensor can be source and target.
    received = [add(reader, other, *sources[start : start + 7]) for start in range(0, len(sources), 7)]
    while writer.step() | reader.step():
        pass
    assert (
        writer.is_idle() and reader.is_idle() and sent.num_open == 0 and not any(batch.num_open for batch in received)
    )
    assert not other.opened
    assert sum(count for _, _, count in other.copies) == sum(value.nbytes for value in sources)
    staged = iter(own.copies)
    for target, source, _ in other.copies:
        if source >= LENT:
            assert target == source - LENT
        else:
            ring, origin, _ = next(staged)
            assert (source - 2 * RING, target) == (ring - RING, origin)
