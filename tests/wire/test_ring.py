"""Which copies a ring makes of the parcels in its queue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from shoal.wire.device_memory import Copy
from shoal.wire.ring import ALIGNMENT, Batch, Piece, RingReader, RingWriter, Signals

RING = 1 << 40  # an address that nothing is read from


class Memory:
    """Notes what is to be copied, and is done at once."""

    def __init__(self) -> None:
        self.copies: list[Copy] = []

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
    return RingWriter(peer=1, memory=memory, address=RING, num_bytes=num_bytes, signals=signals)  # type: ignore[arg-type]


def add(writer: RingWriter | RingReader, memory: Memory, *tensors: torch.Tensor) -> Batch:
    batch = Batch(memory, len(tensors))
    for tensor in tensors:
        writer.add(Piece(tensor, batch))
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
    reader = RingReader(peer=0, memory=memory, address=2 * RING, num_bytes=64 * ALIGNMENT, signals=signals)  # type: ignore[arg-type]
    batch = add(reader, memory, target)
    assert not reader.step()  # nothing is there yet
    for _ in range(2):
        writer.step()
    for _ in range(2):
        reader.step()
    assert memory.copies == [(RING, source.data_ptr(), source.nbytes), (target.data_ptr(), 2 * RING, source.nbytes)]
    assert batch.num_open == 0 and writer.is_idle() and reader.is_idle()
