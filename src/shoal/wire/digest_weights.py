"""The weights of a digest: odd pseudo-random numbers, by column and by row of the table that elements lie in."""

from __future__ import annotations

from functools import lru_cache

import torch

COLUMNS = 1 << 14
"""Width of the table. Both ends must agree on it: it is part of the digest's definition."""


def column_weights(device: torch.device) -> torch.Tensor:
    """Return the `[COLUMNS]` int64 weights of the columns."""
    return _weights_on(COLUMNS, 0, device)


def row_weights(count: int, device: torch.device) -> torch.Tensor:
    """Return int64 weights of the first rows, at least `count` of them."""
    # Rounded to a power of two, so that few tables are kept.
    return _weights_on(1 << max(10, (count - 1).bit_length()), 1, device)


@lru_cache(maxsize=64)
def _weights_on(count: int, stream: int, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return _weights(count, stream).to(device)
    # Later callers may be on any stream, so the table must be complete when it is kept. A stream of its own: waiting
    # for the caller's would also wait for what the caller put there, a peer's message among it.
    with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        return _weights(count, stream).to(device)


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
