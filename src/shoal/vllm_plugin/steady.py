"""Requests to which one step after the other gives a token, with nothing to be decided about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any


class SteadyRequests:
    """The requests that run: those that are steady for some steps more, and those that need a look at each step.

    Args:
        requests: All that run.
        steps_of: Returns for how many steps from now on one is steady; 0 if it has to be looked at.
    """

    def __init__(self, requests: Iterable[Any], steps_of: Callable[[Any], int]) -> None:
        self.steady: dict[str, Any] = {}
        self._others: dict[str, Any] = {}
        self._until: defaultdict[int, list[str]] = defaultdict(list)
        self._step = 0
        self._steps_of = steps_of
        self._sort(requests)

    def __len__(self) -> int:
        return len(self.steady) + len(self._others)

    def begin_step(self) -> list[Any]:
        """Return the requests to be looked at in the next step; the others are `steady` in it."""
        self._step += 1
        for name in self._until.pop(self._step, ()):
            if (request := self.steady.pop(name, None)) is not None:
                self._others[name] = request
        return list(self._others.values())

    def end_step(self) -> None:
        """See again to those that were looked at."""
        looked_at, self._others = self._others, {}
        self._sort(looked_at.values())

    def drop(self, name: str) -> None:
        """Leave out a request that has ended."""
        self.steady.pop(name, None)
        self._others.pop(name, None)

    def _sort(self, requests: Iterable[Any]) -> None:
        for request in requests:
            name, steps = request.request_id, self._steps_of(request)
            if steps > 0:
                self.steady[name] = request
                self._until[self._step + steps + 1].append(name)
            else:
                self._others[name] = request
