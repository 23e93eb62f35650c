"""Tokens that an engine's core has been given by its runner and vLLM's scheduler need not know of yet.

After each step vLLM's scheduler goes through some hundred lines for every request of it, to find that most have one
token more. It can be told of several at once, as of those that speculation finds. Only what may end a request is told
without delay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Untold:
    """The last tokens of one request.

    Attributes:
        stops: Tokens that may end it.
        takes_logprobs: Whether it asked for logprobs.
        most: Tokens of which the last may end it; 0 before its first output has passed.
        token_ids: In their order.
        logprobs: Of each, if asked for.
        ranks: Of each among the vocabulary, if asked for.
    """

    stops: frozenset[int]
    takes_logprobs: bool
    most: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What a step in which each request wrote one token has brought.

    Attributes:
        names: Of the requests that the step was scheduled for; some may have ended since.
        rows: For each request, its row in the others.
        token_ids: For each row, the tokens.
        logprobs: For each row; None if no request asked for any.
        ranks: For each row; None likewise.
    """

    names: Iterable[str]
    rows: Mapping[str, int]
    token_ids: Sequence[Sequence[int]]
    logprobs: Sequence[float] | None
    ranks: Sequence[int] | None


class UntoldTokens:
    """What is kept from vLLM's scheduler, by request."""

    def __init__(self) -> None:
        self._requests: dict[str, Untold] = {}
        self._kept: dict[str, Untold] = {}

    @property
    def names(self) -> list[str]:
        """Requests of which there is something untold."""
        return list(self._kept)

    def open(self, name: str, *, stops: frozenset[int], takes_logprobs: bool) -> None:
        """Begin to keep tokens of a request."""
        self._requests.setdefault(name, Untold(stops, takes_logprobs))

    def forget(self, alive: Collection[str]) -> None:
        """Drop all of requests that have ended."""
        for name in [name for name in self._requests if name not in alive]:
            self.close(name)

    def take(self, step: StepTokens, alive: Collection[str]) -> list[str] | None:
        """Keep what a step has brought.

        Args:
            step: The step.
            alive: All requests that have not ended.

        Returns:
            The requests that have to be told at once; None, and nothing is kept, if one is not ours or wrote other than
            one token.
        """
        found = []
        for name in step.names:
            untold = self._requests.get(name)
            if untold is None:
                if name in alive:
                    return None
                continue  # it ended while this step was under way
            row = step.rows[name]
            tokens = step.token_ids[row]
            if len(tokens) != 1:
                return None
            found.append((name, untold, row, tokens[0]))
        urgent = []
        for name, untold, row, token in found:
            untold.token_ids.append(token)
            if step.logprobs is not None and step.ranks is not None and untold.takes_logprobs:
                untold.logprobs.append(step.logprobs[row])
                untold.ranks.append(step.ranks[row])
            if token in untold.stops or len(untold.token_ids) >= untold.most:
                urgent.append(name)
            self._kept[name] = untold
        return urgent

    def tell(self, names: Iterable[str]) -> dict[str, Untold]:
        """Return what is kept of these requests, which is then told."""
        told = {}
        for name in names:
            untold = self._kept.pop(name, None)
            if untold is not None:
                told[name] = untold
                self._requests[name] = Untold(untold.stops, untold.takes_logprobs)
        return told

    def expect(self, name: str, most: int) -> None:
        """Have a request of which something was told keep so many tokens at most."""
        if (untold := self._requests.get(name)) is not None:
            untold.most = most

    def close(self, name: str) -> None:
        """Keep nothing more of a request."""
        self._requests.pop(name, None)
        self._kept.pop(name, None)
