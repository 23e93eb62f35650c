"""Simulate one step's rollouts on many engines, event by event."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from shoal.bench.dispatch_policies import Policy
from shoal.bench.simulated_engine import EngineModel, SimulatedEngine, SimulatedSample, context_steps
from shoal.rollout.dispatch import Assignment, Move
from shoal.rollout.watch import EngineWatch

Fate = Literal["dies", "stalls"]

_FATE, _PROGRESS, _REPORT, _BALANCE = range(4)  # of events at the same time, in this order
_NOBODY = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is to be written.

    Attributes:
        prompt_tokens: Of every prompt.
        num_tokens: `[P, K]`, the length of each sample.
    """

    prompt_tokens: int
    num_tokens: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What happens to an engine.

    Attributes:
        at_s: When.
        engine: To which.
        fate: Dead at once, for all to see, or writing nothing while it still answers.
    """

    at_s: float
    engine: int
    fate: Fate


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How it went.

    Attributes:
        makespan_s: From the first sample sent to the last one written.
        num_preemptions: How often an engine put a sample off for lack of memory.
        num_again: Samples that had to be issued again.
        num_moved: How often a sample went on elsewhere.
    """

    makespan_s: float
    num_preemptions: int
    num_again: int
    num_moved: int


def draw_work(
    num_prompts: int,
    num_generations: int,
    *,
    median: float,
    p99: float,
    longest: int,
    correlation: float,
    prompt_tokens: int,
    seed: int,
) -> Work:
    """Draw lognormal lengths.

    Args:
        num_prompts: P.
        num_generations: K.
        median: Of the lengths.
        p99: Which one in a hundred exceeds.
        longest: Where completions are cut.
        correlation: Of the logarithms of the lengths of two samples of one prompt.
        prompt_tokens: Of every prompt.
        seed: Of the draw.
    """
    random = np.random.default_rng(seed)
    sigma = math.log(p99 / median) / 2.3263478740408408  # the standard normal distribution's 99th percentile
    of_prompt = random.standard_normal((num_prompts, 1)) * math.sqrt(correlation)
    of_sample = random.standard_normal((num_prompts, num_generations)) * math.sqrt(1 - correlation)
    lengths = median * np.exp(sigma * (of_prompt + of_sample))
    return Work(prompt_tokens=prompt_tokens, num_tokens=np.clip(lengths.round(), 1, longest).astype(np.int64))


def lower_bound_s(work: Work, model: EngineModel, num_engines: int) -> float:
    """Return a time that no dispatcher can beat: of the longest sample alone, or of all work perfectly divided.

    The latter takes steps to be as full as memory and `max_num_seqs` ever allow, and every prompt to be read once.
    """
    lengths = work.num_tokens.ravel().astype(np.float64)
    alone = model.alone_s(work.prompt_tokens, int(lengths.max()))
    of_memory = float(context_steps(0, lengths).sum()) / model.kv_tokens
    fewest_steps = max(float(lengths.sum()) / model.max_num_seqs, of_memory)
    of_samples = float(model.work_s(work.prompt_tokens, lengths).sum())
    of_prompts = model.prefill_s * work.prompt_tokens * len(work.num_tokens)
    return max(alone, (model.step_s * fewest_steps + of_samples + of_prompts) / num_engines)


class Simulation:
    """One step's rollouts.

    Args:
        work: What is to be written.
        model: What an engine costs.
        num_engines: All of them alike.
        policy: Who writes what.
        report_s: How often each engine says what it is doing.
        stall_s: How long an engine may write nothing before it is given up.
    """

    def __init__(
        self,
        work: Work,
        model: EngineModel,
        num_engines: int,
        policy: Policy,
        *,
        report_s: float = 1.0,
        stall_s: float = 120.0,
    ) -> None:
        num_generations = work.num_tokens.shape[1]
        self._samples = [
            SimulatedSample(index, index // num_generations, work.prompt_tokens, int(length))
            for index, length in enumerate(work.num_tokens.ravel())
        ]
        self._engines = [SimulatedEngine(model) for _ in range(num_engines)]
        self._watches = [EngineWatch(stall_s) for _ in range(num_engines)]
        self._in_flight = [0] * num_engines
        self._policy = policy
        self._report_s = report_s
        self._events: list[tuple[float, int, int, int]] = []
        self._stamps = [0] * num_engines
        self._dead: set[int] = set()
        self._num_left = len(self._samples)
        self._num_again = 0
        self._num_moved = 0

    def run(self, troubles: Sequence[Trouble] = ()) -> Outcome:
        """Go on until every sample is written; `troubles` must leave an engine."""
        now = 0.0
        num_engines = len(self._engines)
        for engine in range(num_engines):
            heapq.heappush(self._events, (self._report_s * (engine + 1) / num_engines, _REPORT, engine, 0))
        for index, trouble in enumerate(troubles):
            heapq.heappush(self._events, (trouble.at_s, _FATE, trouble.engine, index))
        heapq.heappush(self._events, (self._report_s, _BALANCE, _NOBODY, 0))
        self._send(self._policy.start(self._samples, now), now)
        while self._num_left:
            now, kind, engine, detail = heapq.heappop(self._events)
            if engine in self._dead or (kind == _PROGRESS and detail != self._stamps[engine]):
                continue
            if kind == _FATE:
                self._strike(troubles[detail], now)
            elif kind == _BALANCE:
                self._balance(now)
            else:
                self._advance(engine, now)
                if kind == _REPORT:
                    self._report(engine, now)
        return Outcome(
            makespan_s=now,
            num_preemptions=sum(engine.num_preemptions for engine in self._engines),
            num_again=self._num_again,
            num_moved=self._num_moved,
        )

    def _send(self, assignments: Sequence[Assignment], now: float) -> None:
        for assignment in assignments:
            self._advance(assignment.engine, now)
            sample = self._samples[assignment.sample]
            self._in_flight[assignment.engine] += 1
            self._engines[assignment.engine].add(sample)
        for engine in {assignment.engine for assignment in assignments}:
            self._expect(engine)

    def _advance(self, engine: int, now: float) -> None:
        """Bring an engine to now, and see to what it has finished by then."""
        ended = self._engines[engine].advance(now)
        self._num_left -= len(ended)
        self._in_flight[engine] -= len(ended)
        self._expect(engine)
        for sample in ended:
            self._send(self._policy.end(sample, now), now)

    def _expect(self, engine: int) -> None:
        """Note when something happens next in an engine."""
        self._stamps[engine] += 1
        if (at_s := self._engines[engine].next_event()) < math.inf:
            heapq.heappush(self._events, (at_s, _PROGRESS, engine, self._stamps[engine]))

    def _report(self, engine: int, now: float) -> None:
        report = self._engines[engine].report()
        if self._watches[engine].answered(report, in_flight=self._in_flight[engine], now=now) is not None:
            self._lose(engine, now)
            return
        self._send(self._policy.report(engine, report, now), now)
        heapq.heappush(self._events, (now + self._report_s, _REPORT, engine, 0))

    def _balance(self, now: float) -> None:
        for move in self._policy.moves(now):
            self._advance(move.source, now)
            self._advance(move.target, now)
            if self._engines[move.source].cut(self._samples[move.sample]):
                self._move(move)
        heapq.heappush(self._events, (now + self._report_s, _BALANCE, _NOBODY, 0))

    def _move(self, move: Move) -> None:
        self._policy.moved(move)
        self._engines[move.target].add(self._samples[move.sample])
        self._in_flight[move.source] -= 1
        self._in_flight[move.target] += 1
        self._num_moved += 1
        self._expect(move.source)
        self._expect(move.target)

    def _strike(self, trouble: Trouble, now: float) -> None:
        self._advance(trouble.engine, now)
        if trouble.fate == "stalls":
            self._engines[trouble.engine].is_stalled = True
        else:
            self._lose(trouble.engine, now)

    def _lose(self, engine: int, now: float) -> None:
        self._dead.add(engine)
        self._num_again += self._in_flight[engine]
        assignments = self._policy.lose(engine, now)
        for assignment in assignments:
            self._samples[assignment.sample].done_tokens = 0.0
        self._send(assignments, now)
