"""A 64-bit digest of a tensor's bits, computed where the tensor lies.

With `b_i` the bits of element i as a signed integer, and `w_i` fixed odd pseudo-random weights,

    digest = sum_i b_i * w_i  mod 2^64,    w_i = column[i mod C] * row[i div C]

The sum is modular, so it does not depend on the order of summation and is exact on every device. One changed element
always changes it: the difference is below 2^64 in magnitude and a weight is odd, hence invertible. Exchanged or shifted
elements change it because weights differ by position. It guards against mistakes and corruption, not against attackers.
"""

from __future__ import annotations

from functools import lru_cache

import torch

_COLUMNS = 1 << 14
_ROWS_PER_CHUNK = 16  # 256k elements: the int64 temporaries (2 MB) stay in a core's cache
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MASK = (1 << 64) - 1


def digest(tensor: torch.Tensor) -> int:
    """Return the digest of `tensor`'s elements in logical (row-major) order, in `[0, 2^64)`.

    The layout in memory does not matter, the order of the elements does. Bits are compared, so 0.0 and -0.0 differ.
    """
    flat = tensor.detach().reshape(-1)
    if flat.is_complex() or flat.element_size() not in _INTEGER_OF_SIZE:
        raise TypeError(f"no digest for dtype {tensor.dtype}")
    bits = flat.view(_INTEGER_OF_SIZE[flat.element_size()])
    columns = _weights(_COLUMNS, 0).to(bits.device)
    num_rows = bits.numel() // _COLUMNS
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    if num_rows:
        rows = _weights(_round_up(num_rows), 1)[:num_rows].to(bits.device)
        table = bits[: num_rows * _COLUMNS].view(num_rows, _COLUMNS)
        for start in range(0, num_rows, _ROWS_PER_CHUNK):
            # `copy`: the product is formed in place, and 8-byte elements would else be the tensor's own memory.
            chunk = table[start : start + _ROWS_PER_CHUNK].to(torch.int64, copy=True)
            total += (chunk.mul_(columns).sum(dim=1) * rows[start : start + _ROWS_PER_CHUNK]).sum()
    tail = bits[num_rows * _COLUMNS :].to(torch.int64)
    last_row = int(_weights(_round_up(num_rows + 1), 1)[num_rows])
    total += (tail * columns[: tail.numel()]).sum() * last_row
    return int(total.item()) & _MASK


def _round_up(count: int) -> int:
    """Round to a power of two, so that few tables of weights are kept."""
    return 1 << max(10, (count - 1).bit_length())


@lru_cache(maxsize=32)
def _weights(count: int, stream: int) -> torch.Tensor:
    """Return `count` odd pseudo-random int64 weights (splitmix64, Steele et al. 2014)."""
    state = torch.arange(1, count + 1, dtype=torch.int64) + (stream << 40)
    value = state * _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shift_right(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift_right(value, 27)) * _signed(0x94D049BB133111EB)
    return (value ^ _shift_right(value, 31)) | 1


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right without carrying the sign (torch has no unsigned 64-bit shifts on every device)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
