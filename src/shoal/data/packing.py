"""Decide which sequences share a micro-batch, and which rank gets it, from their lengths alone."""

from __future__ import annotations

import heapq
from collections import abc
from itertools import chain
from typing import TypeAlias

MicroBatchPlan: TypeAlias = tuple[tuple[tuple[int, ...], ...], ...]
"""For each rank, for each of its micro-batches, the indices of its sequences; empty for a filler."""


def plan_micro_batches(lengths: abc.Sequence[int], num_ranks: int, max_tokens: int) -> MicroBatchPlan:
    """Cut a step's sequences into micro-batches, the same number for every rank and at least one.

    Every rank must run the same number of forward passes, since each is a collective on sharded models: as many as the
    fullest rank needs. Within a rank micro-batches are as alike as the budget lets them be, so that none is left with
    the few tokens that full ones had no room for. A rank with too few sequences gets empty ones, to be filled with
    `build_filler`.

    Args:
        lengths: Tokens of each sequence, prompt included.
        num_ranks: Number of trainer ranks.
        max_tokens: Token budget of a micro-batch; a longer sequence gets one alone.
    """
    per_rank = [_pack_rank(lengths, indices, max_tokens) for indices in balance(lengths, num_ranks)]
    count = max(1, *(len(micro_batches) for micro_batches in per_rank))
    return tuple(
        tuple(tuple(batch) for batch in _even_out(lengths, batches, count, max_tokens)) for batches in per_rank
    )


def balance(lengths: abc.Sequence[int], num_ranks: int) -> list[list[int]]:
    """Share sequences among ranks so that their token counts come out close.

    The longest remaining sequence goes to the rank with the fewest tokens (ties: fewest sequences, then lowest rank),
    which keeps any two ranks within the length of the longest sequence of each other.

    Returns:
        For each rank, the ascending indices of its sequences.
    """
    return _share_out(lengths, range(len(lengths)), num_ranks)


def first_fit_decreasing(lengths: abc.Sequence[int], max_tokens: int) -> list[list[int]]:
    """Put sequences into as few micro-batches of at most `max_tokens` as first-fit-decreasing finds.

    That is at most 11/9 of the fewest possible (and one more). A sequence longer than the budget is alone.

    Returns:
        For each micro-batch, the ascending indices of its sequences.
    """
    return _pack_rank(lengths, range(len(lengths)), max_tokens)


def _share_out(lengths: abc.Sequence[int], indices: abc.Iterable[int], count: int) -> list[list[int]]:
    """Share the sequences at `indices` out as `balance` does."""
    shares: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, 0, share) for share in range(count)]
    for index in _longest_first(lengths, indices):
        num_tokens, num_sequences, share = heapq.heappop(heap)
        shares[share].append(index)
        heapq.heappush(heap, (num_tokens + lengths[index], num_sequences + 1, share))
    return [sorted(share) for share in shares]


def _pack_rank(lengths: abc.Sequence[int], indices: abc.Iterable[int], max_tokens: int) -> list[list[int]]:
    """Pack the sequences at `indices`, longest first, each into the first micro-batch with room."""
    batches: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(lengths, indices):
        place = next((i for i, free in enumerate(room) if lengths[index] <= free), None)
        if place is None:
            place = len(batches)
            batches.append([])
            room.append(max_tokens)
        batches[place].append(index)
        room[place] -= lengths[index]
    return [sorted(batch) for batch in batches]


def _even_out(lengths: abc.Sequence[int], batches: list[list[int]], count: int, max_tokens: int) -> list[list[int]]:
    """Share a rank's sequences out anew among `count` micro-batches, or split packed ones if it breaks the budget."""
    shared = _share_out(lengths, chain.from_iterable(batches), count)
    # So it is where there are fewer sequences than micro-batches: some stay empty.
    if all(len(batch) <= 1 or sum(lengths[i] for i in batch) <= max_tokens for batch in shared):
        return shared
    return _stretch(batches, count)


def _stretch(batches: list[list[int]], count: int) -> list[list[int]]:
    """Split micro-batches, which hold `count` sequences at least, until there are so many of them."""
    batches = list(batches)
    while len(batches) < count:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        batch = batches[largest]
        batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches


def _longest_first(lengths: abc.Sequence[int], indices: abc.Iterable[int]) -> list[int]:
    """Sort by length, longest first, equal lengths by index, so that every rank and every rerun plans the same."""
    return sorted(indices, key=lambda index: (-lengths[index], index))
