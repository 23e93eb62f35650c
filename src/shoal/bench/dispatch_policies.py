"""Who gives which sample to which simulated engine: the pool's own dispatcher, and what it is compared with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

from shoal.bench.simulated_engine import SimulatedSample
from shoal.rollout.dispatch import Assignment, Dispatcher, DispatchSettings, Move
from shoal.types import EngineReport

Rule: TypeAlias = Literal["static_split", "round_robin", "least_pending"]


class Policy(Protocol):
    """What the simulation asks; every answer is what is to be sent now."""

    def start(self, samples: Sequence[SimulatedSample], now: float) -> list[Assignment]:
        """All samples are wanted, those of one prompt next to one another."""
        ...

    def end(self, sample: SimulatedSample, now: float) -> list[Assignment]:
        """A sample is written."""
        ...

    def report(self, engine: int, report: EngineReport, now: float) -> list[Assignment]:
        """An engine says what it is doing."""
        ...

    def lose(self, engine: int, now: float) -> list[Assignment]:
        """An engine is lost, with what it was writing."""
        ...

    def moves(self, now: float) -> list[Move]:
        """Choose samples that are to go on elsewhere."""
        ...

    def moved(self, move: Move) -> None:
        """It was done."""
        ...


class PoolPolicy:
    """The pool's dispatcher, with the time that it takes.

    Args:
        num_engines: All of them ready.
        settings: The pool's.
    """

    def __init__(self, num_engines: int, settings: DispatchSettings) -> None:
        self._dispatcher = Dispatcher(num_engines, settings)
        for engine in range(num_engines):
            self._dispatcher.open(engine)
        self.seconds = 0.0
        """CPU time spent in the dispatcher."""

    def start(self, samples: Sequence[SimulatedSample], now: float) -> list[Assignment]:
        """Want all samples, as one group for each prompt."""
        groups = [
            (prompt, [sample.index for sample in members])
            for prompt, members in itertools.groupby(samples, key=lambda sample: sample.prompt)
        ]
        began = time.process_time()
        for prompt, members in groups:
            self._dispatcher.submit(prompt, members)
        return self._assign(began, now)

    def end(self, sample: SimulatedSample, now: float) -> list[Assignment]:
        """Free the sample's slot."""
        began = time.process_time()
        self._dispatcher.end(sample.index)
        return self._assign(began, now)

    def report(self, engine: int, report: EngineReport, now: float) -> list[Assignment]:
        """Pass it on."""
        began = time.process_time()
        self._dispatcher.report(engine, report)
        return self._assign(began, now)

    def lose(self, engine: int, now: float) -> list[Assignment]:
        """Issue again what it was writing."""
        began = time.process_time()
        self._dispatcher.close(engine)
        for sample in self._dispatcher.samples_of(engine):
            self._dispatcher.issue_again(sample)
        return self._assign(began, now)

    def moves(self, now: float) -> list[Move]:
        """Ask the dispatcher."""
        began = time.process_time()
        moves = self._dispatcher.moves(now)
        self.seconds += time.process_time() - began
        return moves

    def moved(self, move: Move) -> None:
        """Tell the dispatcher."""
        began = time.process_time()
        self._dispatcher.move(move.sample, move.target)
        self.seconds += time.process_time() - began

    def _assign(self, began: float, now: float) -> list[Assignment]:
        assignments = self._dispatcher.assign(now)
        self.seconds += time.process_time() - began
        return assignments


class AtOncePolicy:
    """Sends everything at once, as others do, and what a lost engine was writing again by the same rule.

    Args:
        num_engines: All of them ready.
        rule: Equal runs of samples, each engine in turn, or whichever has the fewest that have not ended.
    """

    def __init__(self, num_engines: int, rule: Rule) -> None:
        self._alive = list(range(num_engines))
        self._rule = rule
        self._pending = [0] * num_engines
        self._engine_of: dict[int, int] = {}
        self._turn = 0

    def start(self, samples: Sequence[SimulatedSample], now: float) -> list[Assignment]:
        """Send all."""
        return self._send([sample.index for sample in samples])

    def end(self, sample: SimulatedSample, now: float) -> list[Assignment]:
        """Count."""
        self._pending[self._engine_of.pop(sample.index)] -= 1
        return []

    def report(self, engine: int, report: EngineReport, now: float) -> list[Assignment]:
        """Nobody listens."""
        return []

    def lose(self, engine: int, now: float) -> list[Assignment]:
        """Send what it was writing to those that are left."""
        self._alive.remove(engine)
        return self._send([sample for sample, index in self._engine_of.items() if index == engine])

    def moves(self, now: float) -> list[Move]:
        """Move nothing."""
        return []

    def moved(self, move: Move) -> None:
        """Nothing is."""

    def _send(self, samples: Sequence[int]) -> list[Assignment]:
        assignments = []
        for place, sample in enumerate(samples):
            engine = self._choose(place, len(samples))
            self._pending[engine] += 1
            self._engine_of[sample] = engine
            assignments.append(Assignment(sample, engine))
        return assignments

    def _choose(self, place: int, num_samples: int) -> int:
        if self._rule == "static_split":
            return self._alive[place * len(self._alive) // num_samples]
        if self._rule == "least_pending":
            return min(self._alive, key=self._pending.__getitem__)
        self._turn += 1
        return self._alive[self._turn % len(self._alive)]
