"""Several engines as one: a sample goes to the engine that can take it soonest, or to another if that one is lost."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass

from shoal.errors import EngineFaultError, EngineRequestError, NoEngineError
from shoal.protocols import RolloutEngine
from shoal.rollout.dispatch import Dispatcher, DispatchSettings, Move
from shoal.rollout.health import Event, Health, State, after
from shoal.rollout.parts import go_on, join
from shoal.rollout.seats import EngineLoad, PoolCounts, Seat, Ticket
from shoal.rollout.tasks import SharedTasks, gather_or_cancel
from shoal.rollout.watch import EngineWatch
from shoal.types import UNPROVEN, EngineReport, Rollout, RolloutRequest

logger = logging.getLogger(__name__)

_MOST_ATTEMPTS = 3
_REPORT_TIMEOUT_S = 10.0
_POLLS_PER_S = 64

OnLost = Callable[[str, str], bool]
"""Told the name of an engine that was given up, and why; returns whether it is on its way back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """How a pool works.

    Attributes:
        dispatch: How samples are spread.
        stall_s: How long an engine may say nothing, or write nothing while it has something to write.
        poll_s: Every how many seconds an engine is asked how it is.
    """

    dispatch: DispatchSettings
    stall_s: float
    poll_s: float = 1.0


class EnginePool:
    """Dispatches samples over engines. It belongs to one event loop; `loads` and `counts` may be called from anywhere.

    Engines begin as `STALE`: none is given anything before `proven` says that it holds the current weights. One that
    dies, stalls or talks nonsense loses its samples to the others. If it is on its way back, it is waited for
    when there is no other.

    Args:
        engines: At least one.
        settings: How it works.
        why_ended: Returns why an engine's process has ended; None while it runs, or if nobody knows.
        on_lost: Told of an engine that was given up.
    """

    def __init__(
        self,
        engines: Sequence[RolloutEngine],
        settings: PoolSettings,
        *,
        why_ended: Callable[[str], str | None] = lambda name: None,
        on_lost: OnLost = lambda name, reason: False,
    ) -> None:
        assert engines, "a pool needs an engine"
        self._settings = settings
        self._seats = [Seat(engine, Health(State.STALE), EngineWatch(settings.stall_s)) for engine in engines]
        self._index = {engine.name: index for index, engine in enumerate(engines)}
        self._why_ended = why_ended
        self._on_lost = on_lost
        self._dispatcher = Dispatcher(len(self._seats), settings.dispatch)
        self._tickets: dict[int, Ticket] = {}
        self._names = itertools.count()
        self._prefix = secrets.token_hex(4)  # another trainer's requests may be on the same engine
        self._num_moves = self._num_lost = self._num_reissued = 0
        self._current_version = UNPROVEN
        self._watching = SharedTasks(lambda: [*map(self._watch, range(len(self._seats))), self._balance()])

    # ---- samples ----

    def new_group(self) -> int:
        """Return a name by which `generate_group` knows samples that are asked for one by one to be of one prompt."""
        return next(self._names)

    async def generate_group(
        self,
        requests: Sequence[RolloutRequest],
        *,
        step: int = 0,
        group: int | None = None,
        near: str | None = None,
    ) -> tuple[Rollout, ...]:
        """Write all samples of one prompt, together on one engine while that is no worse.

        Args:
            requests: One for each sample.
            step: Samples of an older one go first.
            group: Of `new_group`, if others of the prompt may be under way.
            near: Name of the engine that has what they begin with, as it wrote it; None if none does.

        Raises:
            EngineRequestError: The request cannot be answered, or several engines failed it in turn.
            NoEngineError: No engine is left. In both cases the group's other samples are cancelled.
        """
        loop = asyncio.get_running_loop()
        tickets = [Ticket(next(self._names), request, loop.create_future()) for request in requests]
        self._tickets.update((ticket.sample, ticket) for ticket in tickets)
        self._dispatcher.submit(
            self.new_group() if group is None else group,
            [ticket.sample for ticket in tickets],
            step=step,
            home=None if near is None else self._index[near],
        )
        try:
            self._place()
            return await gather_or_cancel(self._write(ticket) for ticket in tickets)
        finally:
            for ticket in tickets:  # one that was cancelled before it began has not done so itself
                self._end(ticket)

    async def _write(self, ticket: Ticket) -> Rollout:
        """Have one sample written, by as many engines in turn as it takes."""
        try:
            while True:
                while ticket.engine is None:
                    if (reason := self.why_hopeless()) is not None:
                        raise NoEngineError(reason)
                    await ticket.placed
                index = ticket.engine
                request = go_on(ticket.request, ticket.parts, name=f"{self._prefix}-{next(self._names)}")
                ticket.attempt = asyncio.create_task(self._seats[index].engine.generate(request))
                ticket.attempt.set_name(request.name)
                await asyncio.wait([ticket.attempt])
                if (rollout := self._outcome(ticket, index, ticket.attempt)) is not None:
                    return rollout
                ticket.attempt = ticket.target = None
        finally:
            self._end(ticket)  # at once: a second cancellation may interrupt the wait below
            if ticket.attempt is not None and not ticket.attempt.done():
                ticket.attempt.cancel()
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([ticket.attempt])

    def _outcome(self, ticket: Ticket, index: int, attempt: asyncio.Task[Rollout]) -> Rollout | None:
        """Return what an attempt has brought; None if another has to follow.

        Raises:
            EngineRequestError: None must follow.
        """
        if attempt.cancelled():
            return None  # `_lose` did, and has put the sample back
        seat = self._seats[index]
        error = attempt.exception()
        if error is None:
            rollout = attempt.result()
            seat.watch.wrote()
            seat.done_tokens += len(rollout.token_ids)
            if rollout.finish_reason == "cut":
                self._hand_over(ticket, rollout)
                return None
            seat.done_samples += 1
            return join([*ticket.parts, rollout])
        if not isinstance(error, EngineFaultError):
            raise error
        if ticket.engine == index:
            self._keep(ticket, error.partial)
            self._put_back(ticket)
        if not seat.is_gone and seat.health.state is not State.SUSPECT:
            reason = seat.watch.failed(str(error)) or self._why_ended(seat.engine.name)
            self._happens(index, Event.FAILED)
            if reason is not None:
                self._lose(index, reason)
        if not seat.is_gone:
            ticket.failures.append(str(error))
            if len(ticket.failures) >= _MOST_ATTEMPTS:
                raise error
        self._place()
        return None

    def _place(self) -> None:
        """Give waiting samples to engines with room."""
        for assignment in self._dispatcher.assign(time.monotonic()):
            ticket = self._tickets[assignment.sample]
            ticket.engine = assignment.engine
            if not ticket.placed.done():  # it is if its owner is being cancelled
                ticket.placed.set_result(None)
        if self.why_hopeless() is not None:
            for ticket in self._tickets.values():
                if not ticket.placed.done():
                    ticket.placed.set_result(None)

    def _put_back(self, ticket: Ticket) -> None:
        """Have a sample wait for another engine, before those that have not begun."""
        self._num_reissued += 1
        self._dispatcher.issue_again(ticket.sample)
        self._wait_again(ticket)

    def _wait_again(self, ticket: Ticket) -> None:
        ticket.engine = None
        ticket.placed = asyncio.get_running_loop().create_future()

    def _hand_over(self, ticket: Ticket, part: Rollout) -> None:
        """Have a sample go on, with what its engine has handed over, where it was to go; elsewhere if that is lost."""
        if len(part.token_ids):
            ticket.parts.append(part)
        if ticket.engine is None or ticket.target is None:
            return  # its engine was lost in the same moment: it waits already
        self._num_moves += 1
        if self._dispatcher.move(ticket.sample, ticket.target):
            ticket.engine = ticket.target
        else:
            self._wait_again(ticket)
            self._place()

    def _keep(self, ticket: Ticket, part: object) -> None:
        """Have a sample go on after what its engine had sent of it before it failed."""
        if isinstance(part, Rollout) and len(part.token_ids):
            ticket.parts.append(part)

    def _end(self, ticket: Ticket) -> None:
        if not ticket.has_ended:
            ticket.has_ended = True
            self._dispatcher.end(ticket.sample)
            del self._tickets[ticket.sample]
            self._place()

    def why_hopeless(self) -> str | None:
        """Return why nothing will be written any more: no engine is left, and none on its way; None if one is."""
        if any(seat.health.state is not State.DEAD for seat in self._seats):
            return None
        reasons = "; ".join(f"{seat.engine.name}: {seat.why_dead}" for seat in self._seats)
        return f"no engine is left to write completions. {reasons}"

    # ---- engines ----

    def loads(self) -> tuple[EngineLoad, ...]:
        """Return each engine's state and load."""
        return tuple(
            EngineLoad(
                name=seat.engine.name,
                state=seat.health.state,
                running=self._dispatcher.in_flight(index),
                done_samples=seat.done_samples,
                done_tokens=seat.done_tokens,
            )
            for index, seat in enumerate(self._seats)
        )

    def publishing(self, version: int) -> None:
        """Weights of this version are about to be sent: no engine is asked for more until it is proven to hold them."""
        self._current_version = version
        for index in range(len(self._seats)):
            self._happens(index, Event.PAUSED)

    def proven(self, version: int, names: Iterable[str]) -> None:
        """Engines were proven to hold this version; they serve if it is that of the last publish."""
        event = Event.PROVEN if version == self._current_version else Event.OUTDATED
        for name in names:
            self._happens(self._index[name], event)
        self._place()

    def asleep(self, names: Iterable[str]) -> None:
        """Engines have given their memory back: they are given nothing until they are proven again."""
        for name in names:
            index = self._index[name]
            assert self._dispatcher.in_flight(index) == 0, "an engine sleeps between steps, when nothing is written"
            self._happens(index, Event.SLEPT)

    def lost(self, name: str, reason: str) -> None:
        """An engine is not to be used any more: what it was writing is written by others."""
        self._lose(self._index[name], reason)
        self._place()

    def started(self, name: str, engine: RolloutEngine) -> None:
        """A new process has taken the place of a lost engine, and answers; it serves once it is `proven`."""
        index = self._index[name]
        seat = self._seats[index]
        seat.engine, seat.watch = engine, EngineWatch(self._settings.stall_s)
        self._dispatcher.renew(index)
        self._happens(index, Event.STARTED)

    def given_up(self, name: str, reason: str) -> None:
        """An engine that was on its way back does not come."""
        seat = self._seats[self._index[name]]
        seat.why_dead = reason
        self._happens(self._index[name], Event.DIED)
        self._place()

    def counts(self) -> PoolCounts:
        """Return what has gone wrong so far."""
        return PoolCounts(engines_lost=self._num_lost, samples_reissued=self._num_reissued)

    def _happens(self, index: int, event: Event) -> None:
        seat = self._seats[index]
        seat.health = after(seat.health, event)
        if seat.health.state is State.READY:
            self._dispatcher.open(index)
        else:
            self._dispatcher.close(index)

    def _lose(self, index: int, reason: str) -> None:
        """Give an engine up. What it has written is taken; what it was writing waits again."""
        seat = self._seats[index]
        if seat.is_gone:
            return
        seat.why_dead = reason
        self._num_lost += 1
        self._happens(index, Event.DIED)
        for ticket in [ticket for ticket in self._tickets.values() if ticket.engine == index]:
            if ticket.attempt is not None and ticket.attempt.done() and not ticket.attempt.cancelled():
                continue  # its owner is about to see to it
            if ticket.attempt is not None:
                self._keep(ticket, seat.engine.written(ticket.attempt.get_name()))
                ticket.attempt.cancel()
            self._put_back(ticket)
        if self._on_lost(seat.engine.name, reason):
            self._happens(index, Event.RESTARTED)

    # ---- watching ----

    def watching(self) -> AbstractAsyncContextManager[None]:
        """Ask the engines regularly how they are, for as long as the context lasts."""
        return self._watching.running()

    async def _watch(self, index: int) -> None:
        """Look after one engine, whatever process it is."""
        seat = self._seats[index]
        seat.watch = EngineWatch(self._settings.stall_s)
        while True:
            if not seat.is_gone:
                reason = self._why_ended(seat.engine.name)
                if reason is None and seat.health.state is not State.ASLEEP:
                    reason = await self._ask(index)
                if reason is not None:
                    self._lose(index, reason)
                self._place()
            await asyncio.sleep(self._every_s)

    async def _balance(self) -> None:
        """Have samples go on elsewhere when engines hold unequally much."""
        while True:
            await asyncio.sleep(self._every_s)
            moves = self._dispatcher.moves(time.monotonic())
            await asyncio.gather(*(self._move(move) for move in moves))

    async def _move(self, move: Move) -> None:
        ticket = self._tickets[move.sample]
        if ticket.attempt is None or ticket.attempt.done():
            return
        ticket.target = move.target
        seat = self._seats[move.source]
        try:
            async with asyncio.timeout(_REPORT_TIMEOUT_S):
                await seat.engine.cut(ticket.attempt.get_name())
        except EngineFaultError as error:
            logger.info("%s was not told to hand over a sample: %s", seat.engine.name, error)
        except (EngineRequestError, TimeoutError) as error:
            # An attached server without the route, say. Its watch sees whether it is well otherwise.
            self._dispatcher.keep(move.source)
            logger.warning("%s does not hand samples over, it keeps what it has begun: %s", seat.engine.name, error)

    @property
    def _every_s(self) -> float:
        return max(self._settings.poll_s, len(self._seats) / _POLLS_PER_S)

    async def _ask(self, index: int) -> str | None:
        """Ask an engine for a report; return why it is given up, or None."""
        seat = self._seats[index]
        engine = seat.engine
        limit_s = min(_REPORT_TIMEOUT_S, self._settings.stall_s)
        asked_at = time.monotonic()
        try:
            # Not `wait_for`: that of Python 3.11 swallows a cancellation that comes in the moment of the answer.
            async with asyncio.timeout(limit_s):
                report: EngineReport = await engine.report()
        except (EngineFaultError, TimeoutError) as error:
            if seat.is_gone or seat.engine is not engine:
                return None
            self._happens(index, Event.FAILED)
            why = str(error) or f"no report within {limit_s:g} s"
            return seat.watch.silent(why, since=asked_at, now=time.monotonic())
        if seat.is_gone or seat.engine is not engine:
            return None
        self._happens(index, Event.ANSWERED)
        self._dispatcher.report(index, report)
        return seat.watch.answered(report, in_flight=self._dispatcher.in_flight(index), now=time.monotonic())
