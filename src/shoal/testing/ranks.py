"""Trainer ranks as threads of one process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from shoal.errors import ShoalError

_T = TypeVar("_T")
_TIMEOUT_S = 30.0


class _Meeting:
    """Where the ranks leave values for one another."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=_TIMEOUT_S)
        self.values: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()  # nobody leaves the next value before all have seen these
        return values


class ThreadRanks:
    """A `Ranks` of threads. A rank that stays away is a `threading.BrokenBarrierError` on the others."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self._rank = rank
        self._meeting = meeting

    @property
    def rank(self) -> int:
        """Of this thread."""
        return self._rank

    @property
    def num_ranks(self) -> int:
        """Threads."""
        return self._meeting.barrier.parties

    def json(self, make: Callable[[], Any]) -> Any:
        """Call `make` on rank 0 and return its value on all ranks."""
        text, failure = "", None
        if self._rank == 0:
            try:
                text = json.dumps(make())
            except Exception as error:
                failure = error
        text, said = self._meeting.exchange(self._rank, (text, failure and repr(failure)))[0]
        if failure is not None:
            raise failure
        if said:
            raise ShoalError(f"rank 0 failed: {said}")
        return json.loads(text)

    def gather_json(self, value: Any) -> list[Any]:
        """Return every rank's value on all ranks."""
        return [json.loads(text) for text in self._meeting.exchange(self._rank, json.dumps(value))]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks, modulo 2^64."""
        return torch.stack(self._meeting.exchange(self._rank, values)).sum(0)


def on_ranks(num_ranks: int, action: Callable[[ThreadRanks], _T]) -> list[_T | Exception]:
    """Run something on every rank at once; return what each returned or raised, in the order of ranks."""
    meeting = _Meeting(num_ranks)

    def outcome(rank: int) -> _T | Exception:
        try:
            return action(ThreadRanks(rank, meeting))
        except Exception as error:
            return error

    with ThreadPoolExecutor(num_ranks, thread_name_prefix="rank") as threads:
        return list(threads.map(outcome, range(num_ranks)))
