"""The digest of many contiguous runs in one kernel launch, at about the speed at which the memory can be read.

A block reads a strip, `WIDTH` columns wide and at most `_ROWS` rows high, of the table that a run's elements are laid
out in. A thread stays in its columns: it sums `bits * row weight` down the rows, which is two or three 32-bit
multiply-adds for an element of up to 4 bytes, and multiplies by the column's weight once, at the end.

The table begins at the 16-byte boundary at or before the run's first element, so that whole rows are read 16 bytes at a
time. Its columns are therefore not the digest's: they are shifted by a constant, and a lane whose column passes the end
of the digest's row belongs to the row below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import triton
import triton.language as tl

from shoal.wire.digest_weights import COLUMNS, column_weights, row_weights

Span: TypeAlias = tuple[int, int, int, int]
"""Contiguous elements: their address, how many they are, the number of the first in its whole, the digest's slot."""

_ALIGNMENT = 16  # bytes, the widest load of a thread
_NUM_WARPS = 4
_WIDTH_BYTES = _NUM_WARPS * 32 * _ALIGNMENT  # one such load of each thread
_ROWS = 64  # 128 KB a block: the column weights are read once for 64 rows, and there are blocks enough for every SM


class KernelPlan:
    """The launch for runs of one element size: their table on the device, and which block reads which run."""

    def __init__(self, spans: Sequence[Span], element_size: int, device: torch.device) -> None:
        """Build the tables and upload them on the current stream, without waiting."""
        self._element_size = element_size
        self._width = _WIDTH_BYTES // element_size
        self._device = device
        address, count, start, slot = torch.tensor(spans, dtype=torch.int64).T
        # From here on elements are numbered from the boundary: the run is [skipped, end).
        skipped = address % _ALIGNMENT // element_size
        end = skipped + count
        first = start - skipped
        num_strips = (-(-end // self._width)).clamp(max=COLUMNS // self._width)
        num_blocks = num_strips * -(-end // (COLUMNS * _ROWS))
        first_block = num_blocks.cumsum(0) - num_blocks
        column, row = first % COLUMNS, first // COLUMNS
        fields = [address - skipped * element_size, skipped, end, column, row, slot, first_block, num_strips]
        owners = torch.arange(len(spans), dtype=torch.int32).repeat_interleave(num_blocks)
        self._num_blocks = len(owners)
        self._table = _upload(torch.stack(fields, dim=1), device)
        self._owners = _upload(owners, device)
        self._columns = column_weights(device)
        # One more than is needed: each row is read together with the one below.
        self._rows = _split(row_weights(int((start + count).max()) // COLUMNS + 2, device))

    def add_to(self, out: torch.Tensor) -> None:
        """Add every run's share to its slot of `out`, `[slots]` int64 on the plan's device, on the current stream."""
        with torch.cuda.device(self._device if self._device.type == "cuda" else -1):
            _add_shares[(self._num_blocks,)](
                self._table,
                self._owners,
                self._columns,
                self._rows,
                out,
                SIZE=self._element_size,
                WIDTH=self._width,
                COLUMNS=COLUMNS,
                ROWS=_ROWS,
                FIELDS=self._table.shape[1],
                num_warps=_NUM_WARPS,
            )


def _upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device without waiting: pinned memory that torch frees only after the copy."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _split(weights: torch.Tensor) -> torch.Tensor:
    """Return `[count, 2]` int32 (low, high) with `weight = low + 2^32 high`, low being signed.

    The kernel loads the halves as they are: the compiler takes a 32 by 32 bit product for the full one only where both
    factors are seen to be 32 bits wide.
    """
    carried = weights + ((weights & (1 << 31)) << 1)
    return carried.view(torch.int32).view(-1, 2)


@triton.jit
def _add_shares(
    table,
    owners,
    columns,
    rows,
    out,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    block = tl.program_id(0)
    run = table + tl.load(owners + block).to(tl.int64) * FIELDS
    base = tl.load(run)
    skipped = tl.load(run + 1)
    end = tl.load(run + 2)
    shift = tl.load(run + 3).to(tl.int32)
    first_row = tl.load(run + 4)
    slot = tl.load(run + 5)
    within = (block - tl.load(run + 6)).to(tl.int32)
    num_strips = tl.load(run + 7).to(tl.int32)

    left = (within % num_strips) * WIDTH
    lane = left + tl.arange(0, WIDTH)
    # This block's rows [top, bottom), and those that are read with no look at the run's ends or at the row below.
    top = (within // num_strips).to(tl.int64) * ROWS
    bottom = tl.minimum(top + ROWS, (end + COLUMNS - 1) // COLUMNS)
    whole_top = top
    if top == 0 and left < skipped:
        whole_top += 1
    whole_bottom = tl.maximum(whole_top, tl.minimum(bottom, (end - left - WIDTH + COLUMNS) // COLUMNS))
    if left + shift < COLUMNS and left + shift + WIDTH > COLUMNS:
        whole_top = top
        whole_bottom = top

    low = tl.zeros([WIDTH], dtype=tl.int32 if SIZE == 1 else tl.int64)
    middle = tl.zeros([WIDTH], dtype=tl.int32)
    high = tl.zeros([WIDTH], dtype=tl.int32)
    start = _pointer(base, SIZE) + lane
    weights = rows + 2 * (first_row + (left + shift) // COLUMNS)
    for row in tl.range(whole_top, whole_bottom, loop_unroll_factor=4):
        bits = tl.load(start + row * COLUMNS)
        weight_low = tl.load(weights + 2 * row)
        weight_high = tl.load(weights + 2 * row + 1)
        low, middle, high = _add(low, middle, high, bits, weight_low, weight_high, SIZE)

    weights = rows + 2 * first_row
    in_next = lane + shift >= COLUMNS
    num_above = whole_top - top
    for index in range(num_above + bottom - whole_bottom):
        row = tl.where(index < num_above, top + index, whole_bottom + index - num_above)
        from_lane = tl.maximum(skipped - row * COLUMNS, 0).to(tl.int32)
        to_lane = tl.minimum(end - row * COLUMNS, COLUMNS).to(tl.int32)
        bits = tl.load(start + row * COLUMNS, mask=(lane >= from_lane) & (lane < to_lane), other=0)
        # The row before the first holds skipped elements only.
        exists = first_row + row >= 0
        this_low = tl.load(weights + 2 * row, mask=exists, other=0)
        this_high = tl.load(weights + 2 * row + 1, mask=exists, other=0)
        next_low = tl.load(weights + 2 * row + 2)
        next_high = tl.load(weights + 2 * row + 3)
        edge_low = tl.where(in_next, next_low, this_low)
        edge_high = tl.where(in_next, next_high, this_high)
        low, middle, high = _add(low, middle, high, bits, edge_low, edge_high, SIZE)

    total = low.to(tl.int64) + (middle.to(tl.int64) << 16) + (high.to(tl.int64) << 32)
    total *= tl.load(columns + (lane + shift) % COLUMNS)
    tl.atomic_add(out + slot, tl.sum(total), sem="relaxed")


@triton.jit
def _add(low, middle, high, bits, weight_low, weight_high, SIZE: tl.constexpr):
    """Add `bits * weight` to `low + 2^16 middle + 2^32 high`, all mod 2^64."""
    if SIZE == 8:
        low += bits * (weight_low.to(tl.int64) + (weight_high.to(tl.int64) << 32))
    elif SIZE == 1:
        # Below 2^23 in magnitude each, so that the 64 of a block fit in 32 bits. The compiler widens octets straight to
        # 64 bits and then misses the 32 by 32 bit product.
        low += bits.to(tl.int32) * (weight_low & 0xFFFF)
        middle += bits.to(tl.int32) * (weight_low >> 16)
        high += bits.to(tl.int32) * weight_high
    else:
        low += bits.to(tl.int32).to(tl.int64) * weight_low.to(tl.int64)
        high += bits.to(tl.int32) * weight_high
    return low, middle, high


@triton.jit
def _pointer(address, SIZE: tl.constexpr):
    """Return the address as a pointer to integers of that size. It is a multiple of 16 (`_ALIGNMENT`)."""
    if SIZE == 1:
        pointer = address.to(tl.pointer_type(tl.int8))
    elif SIZE == 2:
        pointer = address.to(tl.pointer_type(tl.int16))
    elif SIZE == 4:
        pointer = address.to(tl.pointer_type(tl.int32))
    else:
        pointer = address.to(tl.pointer_type(tl.int64))
    return tl.multiple_of(pointer, 16)
