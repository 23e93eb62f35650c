"""A vLLM engine as the simulation has it: what a step costs, what fits into its memory, what is put off.

Every running sample advances by one token a step, and a step takes longer the more samples run and the more context
they have. Between two events (a sample ends, is added, or memory is full) the batch is constant, so the time of any
number of steps is a formula and nothing is stepped through. Steps are taken as continuous, which is off by at most one
step for each event. A prompt's keys and values are held once while any of its samples runs, though each step reads them
for each sample; computing them holds up the samples that run.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shoal.types import EngineReport

_Count = TypeVar("_Count", float, npt.NDArray[np.float64])


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """What an engine costs. The defaults resemble an H100 with a model of 1.7 billion parameters in bfloat16.

    Attributes:
        step_s: Of a decode step with nothing in it: reading the weights, scheduling, launching.
        sequence_s: What each running sample adds to a step.
        context_s: What each token of context adds to a step: reading its keys and values.
        prefill_s: Of each prompt token that is not in the prefix cache, and of each token of a sample that was put off.
        kv_tokens: Tokens that fit into the KV cache.
        max_num_seqs: Samples that run at once at most.
    """

    step_s: float = 4e-3
    sequence_s: float = 16e-6
    context_s: float = 0.049e-6
    prefill_s: float = 8.5e-6
    kv_tokens: int = 560_000
    max_num_seqs: int = 256

    def alone_s(self, prompt_tokens: int, num_tokens: int) -> float:
        """Return how long one sample takes on an idle engine."""
        return self.prefill_s * prompt_tokens + self.step_s * num_tokens + self.work_s(prompt_tokens, num_tokens)

    def work_s(self, prompt_tokens: int, num_tokens: _Count) -> _Count:
        """Return what a sample adds to the steps it takes part in, all together."""
        return self.sequence_s * num_tokens + self.context_s * context_steps(prompt_tokens, num_tokens)


def context_steps(prompt_tokens: int, num_tokens: _Count) -> _Count:
    """Return the tokens of context that a sample has at each of its steps, added up."""
    return num_tokens * prompt_tokens + num_tokens**2 / 2


@dataclass(slots=True, eq=False)
class SimulatedSample:
    """One sample of the simulated work.

    Attributes:
        index: Of the sample.
        prompt: Number of its prompt.
        prompt_tokens: Length of the prompt.
        num_tokens: How many tokens it will have.
        done_tokens: How many of them it had when it was last put off.
    """

    index: int
    prompt: int
    prompt_tokens: int
    num_tokens: int
    done_tokens: float = 0.0


@dataclass(slots=True)
class _Running:
    sample: SimulatedSample
    began_step: float
    is_there: bool = True


@dataclass(slots=True)
class SimulatedEngine:
    """One engine. `advance` brings it to a time; all else is about that time."""

    model: EngineModel
    time: float = 0.0
    num_preemptions: int = 0
    num_tokens: float = 0.0
    is_stalled: bool = False
    _steps: float = 0.0
    _context: float = 0.0
    _held: float = 0.0
    _prefill_left_s: float = 0.0
    _by_end: list[tuple[float, int, _Running]] = field(default_factory=list)
    _by_start: list[_Running] = field(default_factory=list)
    _num_running: int = 0
    _waiting: deque[SimulatedSample] = field(default_factory=deque)
    _sharers: dict[int, int] = field(default_factory=dict)
    _num_begun: int = 0

    def add(self, sample: SimulatedSample) -> None:
        """Ask for a sample."""
        self._waiting.append(sample)
        self._admit()

    def cut(self, sample: SimulatedSample) -> bool:
        """Hand a sample over as far as it is; False if it is not here."""
        if sample in self._waiting:
            self._waiting.remove(sample)
            return True
        run = next((run for run in self._by_start if run.is_there and run.sample is sample), None)
        if run is None:
            return False
        self._leave(run)
        sample.done_tokens += self._steps - run.began_step
        self._drop_void()
        self._admit()
        return True

    def advance(self, now: float) -> list[SimulatedSample]:
        """Go on until `now`, which is no later than `next_event`; return the samples that ended then."""
        if self.is_stalled:
            self.time = now
            return []
        left = now - self.time
        self.time = now
        paid = min(left, self._prefill_left_s)
        self._prefill_left_s -= paid
        if self._num_running and left > paid:
            steps = self._steps_in(left - paid)
            self._steps += steps
            self._context += steps * self._num_running
            self._held += steps * self._num_running
            self.num_tokens += steps * self._num_running
        ended = self._end_those_done()
        self._put_off()
        self._admit()
        return ended

    def next_event(self) -> float:
        """Return when a sample ends or memory is full, if nothing is added until then."""
        if self.is_stalled or not self._num_running:
            return math.inf
        until_end = max(0.0, self._by_end[0][0] - self._steps)
        until_full = max(0.0, (self.model.kv_tokens - self._held) / self._num_running)
        return self.time + self._prefill_left_s + self._seconds_of(min(until_end, until_full))

    def report(self) -> EngineReport:
        """Return what vLLM's metrics would say."""
        return EngineReport(
            running=self._num_running,
            waiting=len(self._waiting),
            kv_usage=min(1.0, max(0.0, self._held / self.model.kv_tokens)),
            num_preemptions=self.num_preemptions,
            num_tokens=int(self.num_tokens),
        )

    def _seconds_of(self, steps: float) -> float:
        running, model = self._num_running, self.model
        first = model.step_s + model.sequence_s * running + model.context_s * self._context
        return first * steps + model.context_s * running * steps**2 / 2

    def _steps_in(self, seconds: float) -> float:
        running, model = self._num_running, self.model
        first = model.step_s + model.sequence_s * running + model.context_s * self._context
        growth = model.context_s * running
        return 2 * seconds / (first + math.sqrt(first**2 + 2 * growth * seconds))

    def _end_those_done(self) -> list[SimulatedSample]:
        ended = []
        while self._by_end and (not self._by_end[0][2].is_there or self._by_end[0][0] <= self._steps + 1e-6):
            _, _, run = heapq.heappop(self._by_end)
            if run.is_there:
                self._leave(run)
                ended.append(run.sample)
        return ended

    def _put_off(self) -> None:
        """Put off the last to begin until the rest fits, as vLLM does; their tokens are read again later."""
        while self._num_running > 1 and self._held > self.model.kv_tokens - 1e-3 * self._num_running:
            run = next(run for run in reversed(self._by_start) if run.is_there)
            self._leave(run)
            run.sample.done_tokens += self._steps - run.began_step
            self._waiting.appendleft(run.sample)
            self.num_preemptions += 1
        self._drop_void()

    def _leave(self, run: _Running) -> None:
        run.is_there = False
        sample = run.sample
        self._num_running -= 1
        tokens = sample.done_tokens + self._steps - run.began_step
        self._context -= sample.prompt_tokens + tokens
        self._held -= tokens
        self._sharers[sample.prompt] -= 1
        if not self._sharers[sample.prompt]:
            del self._sharers[sample.prompt]
            self._held -= sample.prompt_tokens
        while self._by_start and not self._by_start[-1].is_there:
            self._by_start.pop()

    def _drop_void(self) -> None:
        while self._by_end and not self._by_end[0][2].is_there:
            heapq.heappop(self._by_end)

    def _admit(self) -> None:
        """Begin what waits while it fits with a step's growth of all, in order."""
        while self._waiting and self._num_running < self.model.max_num_seqs:
            sample = self._waiting[0]
            is_shared = sample.prompt in self._sharers
            new = sample.done_tokens + (0 if is_shared else sample.prompt_tokens)
            if self._num_running and self._held + new + self._num_running + 1 > self.model.kv_tokens:
                return
            self._waiting.popleft()
            self._sharers[sample.prompt] = self._sharers.get(sample.prompt, 0) + 1
            self._context += sample.prompt_tokens + sample.done_tokens
            self._held += new
            self._prefill_left_s += self.model.prefill_s * new
            self._num_running += 1
            self._num_begun += 1
            run = _Running(sample, self._steps)
            end = self._steps + sample.num_tokens - sample.done_tokens
            heapq.heappush(self._by_end, (end, self._num_begun, run))
            self._by_start.append(run)
