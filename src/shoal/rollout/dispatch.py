"""Which engine writes which sample: a pure, deterministic dispatcher over any number of engines.

It does no I/O and knows no clock. Whoever owns it says what happens (a sample is wanted, done, cancelled, its engine
lost; an engine opens, closes, reports), asks `assign` what to send where, and `moves` what to take along to another.

Samples come in groups, one for each prompt. An engine with a free slot first takes a sample of a prompt that it has the
keys and values of, then a prompt that nobody has begun, then one that waits for another engine. So groups stay together
while no engine idles. Samples of an older step go first. Each of these takes O(log n) of engines and groups.

How long a sample will be shows only while it is written: a few are longer than all the rest together, and where two of
those meet, they hold one another up to the end of the step. Once nothing waits, `moves` evens out what engines hold.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal.types import EngineReport

_COMPACT = 4
_LEAST_SHARE = 0.002  # of a KV cache: below it, reading a sample's tokens again costs more than it evens out
_LEAST_AGE_S = 5.0  # most samples end early; those that are left are the long ones
_REPORTS_AFTER_MOVE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchSettings:
    """How samples are spread.

    Attributes:
        max_in_flight: Samples that one engine may have under way, whatever its memory. The rest wait here, where they
            can still go to whichever engine is free first.
        affinity_margin: How many samples more than the least loaded engine the one that has the prompt may have.
        kv_target: Share of its KV cache up to which an engine is filled.
    """

    max_in_flight: int
    affinity_margin: int
    kv_target: float = 0.9


@dataclass(frozen=True, slots=True)
class Assignment:
    """A sample that is to be sent to an engine now."""

    sample: int
    engine: int


@dataclass(frozen=True, slots=True)
class Move:
    """A sample that is to go on, from where it is, on another engine."""

    sample: int
    source: int
    target: int


@dataclass(slots=True)
class _Engine:
    """What is known of one engine.

    Attributes:
        is_open: Whether it may be given samples.
        samples: Those given to it that have not ended, with the times at which they were begun.
        peak: The most it had since its last report: a report may be older than what has ended since.
        foreign: Requests of others that it reported.
        limit: Samples that it may have under way.
        kv_usage: By its last report.
        num_preemptions: By its last report.
        num_unseen: Reports to come before what was last moved shows in them.
        can_move: Whether it hands over what it has not finished.
        homed: Groups that wait for it, oldest step first.
        stamp: Counts changes of the load; entries of the heap with another stamp are void.
    """

    limit: int
    is_open: bool = False
    samples: dict[int, float] = field(default_factory=dict)
    peak: int = 0
    foreign: int = 0
    kv_usage: float = 0.0
    num_preemptions: int = 0
    num_unseen: int = 0
    can_move: bool = True
    stamp: int = 0
    homed: list[tuple[tuple[int, float, int], _Group]] = field(default_factory=list)

    @property
    def load(self) -> int:
        """Requests that the next sample would find."""
        return len(self.samples) + self.foreign

    @property
    def has_room(self) -> bool:
        return self.is_open and self.load < self.limit


@dataclass(slots=True, eq=False)
class _Group:
    """Samples of one prompt.

    Attributes:
        order: Oldest step first, then the longest expected, then the first to come.
        waiting: Samples that are to be sent.
        num_left: Samples that have not ended, waiting ones included.
        home: The engine that was last given one of them.
    """

    name: int
    order: tuple[int, float, int]
    waiting: deque[int] = field(default_factory=deque)
    num_left: int = 0
    home: int | None = None

    def __lt__(self, other: _Group) -> bool:
        return self.order < other.order


class Dispatcher:
    """Samples that wait, engines that write, and who is to write what.

    Args:
        num_engines: They are called by their numbers; all are closed at first.
        settings: How samples are spread.
    """

    def __init__(self, num_engines: int, settings: DispatchSettings) -> None:
        self._settings = settings
        self._engines = [_Engine(limit=settings.max_in_flight) for _ in range(num_engines)]
        self._heap: list[tuple[int, int, int]] = []
        self._groups: dict[int, _Group] = {}
        self._group_of: dict[int, _Group] = {}
        self._engine_of: dict[int, int] = {}
        # Groups with waiting samples: those without a home, and all. Entries whose group has changed are void.
        self._fresh: list[_Group] = []
        self._all: list[_Group] = []
        self._num_groups = 0
        self._num_waiting = 0

    @property
    def num_waiting(self) -> int:
        """Samples that no engine has been given yet."""
        return self._num_waiting

    def in_flight(self, engine: int) -> int:
        """Return how many samples the engine was given that have not ended."""
        return len(self._engines[engine].samples)

    def samples_of(self, engine: int) -> list[int]:
        """Return the samples that the engine was given and that have not ended."""
        return list(self._engines[engine].samples)

    def open(self, engine: int) -> None:
        """From now on the engine may be given samples."""
        self._engines[engine].is_open = True
        self._touch(engine)

    def close(self, engine: int) -> None:
        """From now on the engine is given nothing more; what it is writing stays its own."""
        self._engines[engine].is_open = False
        self._touch(engine)

    def renew(self, engine: int) -> None:
        """Forget what the engine has reported: another process takes its place, which begins anew."""
        slot = self._engines[engine]
        slot.limit, slot.foreign, slot.peak = self._settings.max_in_flight, 0, len(slot.samples)
        slot.kv_usage, slot.num_preemptions, slot.num_unseen, slot.can_move = 0.0, 0, 0, True
        self._touch(engine)

    def submit(
        self,
        group: int,
        samples: Iterable[int],
        *,
        step: int = 0,
        expected_tokens: float = 0.0,
        home: int | None = None,
    ) -> None:
        """Want some samples of one prompt, or further ones of a group that has not ended.

        Args:
            group: The prompt, under a name that no other group bears at the time.
            samples: Names of the samples, that no others bear at the time.
            step: Samples of an older one go first.
            expected_tokens: How long each will be; of one step, the longer go first.
            home: The engine that has what they begin with; None if none has, or if the group is there already.
        """
        entry = self._groups.get(group)
        if entry is None:
            self._num_groups += 1
            entry = _Group(name=group, order=(step, -expected_tokens, self._num_groups), home=home)
        new = list(samples)
        for sample in new:
            assert sample not in self._group_of, f"sample {sample!r} is there already"
            self._group_of[sample] = entry
        entry.waiting.extend(new)
        entry.num_left += len(new)
        self._num_waiting += len(new)
        if new:
            self._groups[group] = entry
            self._enqueue(entry)

    def assign(self, now: float) -> list[Assignment]:
        """Give waiting samples to engines with room, until either runs out.

        Args:
            now: Seconds, of a clock that never goes back.
        """
        assignments = []
        while self._num_waiting:
            engine = self._least_loaded()
            if engine is None:
                break
            group = self._next_group(engine)
            home = group.home
            if home is not None and home != engine and self._may_stay(home, engine):
                engine = home
            sample = group.waiting.popleft()
            self._num_waiting -= 1
            if group.home != engine:
                group.home = engine
                if group.waiting:
                    heapq.heappush(self._engines[engine].homed, (group.order, group))
            self._give(sample, engine, now)
            assignments.append(Assignment(sample, engine))
        return assignments

    def end(self, sample: int) -> None:
        """Forget a sample, which is done, has failed or was cancelled. Its slot is free at once."""
        group = self._group_of.pop(sample)
        if not self._free(sample):
            group.waiting.remove(sample)
            self._num_waiting -= 1
        group.num_left -= 1
        if group.num_left == 0:
            del self._groups[group.name]

    def issue_again(self, sample: int) -> None:
        """Have a sample that an engine was given written by another, before those that wait."""
        assert self._free(sample), f"sample {sample!r} has not been given to an engine"
        group = self._group_of[sample]
        group.waiting.appendleft(sample)
        self._num_waiting += 1
        group.home = None
        self._enqueue(group)

    def moves(self, now: float) -> list[Move]:
        """Choose samples that are to go on elsewhere, so that engines hold equally much. None while samples wait.

        The fullest engine is paired with the emptiest, the next with the next, and each pair moves at most the one
        sample that evens it out best without turning it round. A sample that was moved counts for `move` only. How much
        each holds is taken from the engine's report and the samples' ages; all engines are taken to be alike.

        Args:
            now: Seconds, of the same clock.
        """
        if self._num_waiting:
            return []
        engines = [i for i, slot in enumerate(self._engines) if slot.is_open and slot.num_unseen == 0]
        engines.sort(key=lambda index: self._engines[index].kv_usage)
        moves = []
        for target, source in zip(engines[: len(engines) // 2], reversed(engines), strict=False):
            gap = self._engines[source].kv_usage - self._engines[target].kv_usage
            if gap < _LEAST_SHARE:
                break
            if (sample := self._evening(source, gap, now)) is not None:
                moves.append(Move(sample, source, target))
                self._engines[source].num_unseen = self._engines[target].num_unseen = _REPORTS_AFTER_MOVE
        return moves

    def move(self, sample: int, target: int) -> bool:
        """Take note that a sample goes on elsewhere; False if it cannot and waits, since that engine was closed."""
        if not self._engines[target].is_open:
            self.issue_again(sample)
            return False
        begun = self._engines[self._engine_of[sample]].samples[sample]
        self._free(sample)
        self._give(sample, target, begun)
        return True

    def keep(self, engine: int) -> None:
        """Move nothing away from this engine any more: it does not hand over what it has not finished."""
        self._engines[engine].can_move = False

    def report(self, engine: int, report: EngineReport) -> None:
        """Take up what an engine says of itself."""
        slot = self._engines[engine]
        slot.kv_usage = report.kv_usage
        slot.num_unseen = max(0, slot.num_unseen - 1)
        slot.foreign = max(0, report.running + report.waiting - max(slot.peak, len(slot.samples)))
        slot.peak = len(slot.samples)
        preempted = report.num_preemptions > slot.num_preemptions
        slot.num_preemptions = report.num_preemptions
        limit = self._settings.max_in_flight
        if report.running and report.kv_usage > 0:
            limit = min(limit, int(report.running * self._settings.kv_target / report.kv_usage))
        if preempted or report.waiting:
            limit = min(limit, report.running)
        slot.limit = max(1, limit)
        self._touch(engine)

    def _may_stay(self, home: int, least: int) -> bool:
        """Whether a group's home may have its next sample rather than the least loaded engine."""
        there, here = self._engines[home], self._engines[least]
        return there.has_room and there.load <= here.load + self._settings.affinity_margin

    def _free(self, sample: int) -> bool:
        engine = self._engine_of.pop(sample, None)
        if engine is None:
            return False
        del self._engines[engine].samples[sample]
        self._touch(engine)
        return True

    def _give(self, sample: int, engine: int, begun: float) -> None:
        slot = self._engines[engine]
        slot.samples[sample] = begun
        slot.peak = max(slot.peak, len(slot.samples))
        self._engine_of[sample] = engine
        self._touch(engine)

    def _evening(self, engine: int, gap: float, now: float) -> int | None:
        """Return the engine's sample whose share of the KV cache is next below half of the gap, if it is worth it."""
        slot = self._engines[engine]
        if not slot.can_move:
            return None
        total = sum(now - begun for begun in slot.samples.values())
        if total <= 0:
            return None
        # Samples of one engine advance at one pace, so that they share what it holds as their ages do.
        shares = {sample: slot.kv_usage * (now - begun) / total for sample, begun in slot.samples.items()}
        fitting = [
            (share, sample)
            for sample, share in shares.items()
            if _LEAST_SHARE / 2 <= share <= gap / 2 and now - slot.samples[sample] >= _LEAST_AGE_S
        ]
        return max(fitting)[1] if fitting else None

    def _touch(self, engine: int) -> None:
        """Renew an engine's place in the heap."""
        slot = self._engines[engine]
        slot.stamp += 1
        if not slot.has_room:
            return
        heapq.heappush(self._heap, (slot.load, engine, slot.stamp))
        if len(self._heap) > _COMPACT * len(self._engines):
            self._heap = [entry for entry in self._heap if self._engines[entry[1]].stamp == entry[2]]
            heapq.heapify(self._heap)

    def _least_loaded(self) -> int | None:
        """Return the engine with room and the least load, the first of several."""
        heap = self._heap
        while heap:
            _, engine, stamp = heap[0]
            if self._engines[engine].stamp == stamp:
                return engine
            heapq.heappop(heap)
        return None

    def _enqueue(self, group: _Group) -> None:
        heapq.heappush(self._all, group)
        if group.home is None:
            heapq.heappush(self._fresh, group)
        else:
            heapq.heappush(self._engines[group.home].homed, (group.order, group))

    def _next_group(self, engine: int) -> _Group:
        """Return the group that the engine is to take a sample of."""
        while not self._all[0].waiting:
            heapq.heappop(self._all)
        first = self._all[0]
        homed = self._engines[engine].homed
        while homed and not (homed[0][1].waiting and homed[0][1].home == engine):
            heapq.heappop(homed)
        if homed and homed[0][0][0] == first.order[0]:
            return homed[0][1]
        while self._fresh and not (self._fresh[0].waiting and self._fresh[0].home is None):
            heapq.heappop(self._fresh)
        if self._fresh and self._fresh[0].order[0] == first.order[0]:
            return self._fresh[0]
        return first
