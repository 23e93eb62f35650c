"""Several engines as one: a sample goes to the engine that can take it soonest, or to another if that one is lost."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from shoal.errors import EngineError, EngineFaultError, EngineRequestError
from shoal.protocols import RolloutEngine
from shoal.rollout.dispatch import Dispatcher, DispatchSettings, Move
from shoal.rollout.health import Event, Health, State, after
from shoal.rollout.parts import go_on, join
from shoal.rollout.tasks import gather_or_cancel
from shoal.rollout.watch import EngineWatch
from shoal.types import UNPROVEN, EngineReport, Rollout, RolloutRequest

logger = logging.getLogger(__name__)

_MOST_ATTEMPTS = 3
_REPORT_TIMEOUT_S = 10.0
_POLLS_PER_S = 64

OnLost = Callable[[str, str], None]
"""Told the name of an engine that was given up, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What an engine is doing and has done.

    Attributes:
        name: Of the engine.
        state: Where it stands.
        running: Samples under way.
        done_samples: Samples finished since the start.
        done_tokens: Completion tokens of those.
    """

    name: str
    state: State
    running: int
    done_samples: int
    done_tokens: int


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


@dataclass(slots=True, eq=False)
class _Seat:
    """An engine with what the pool knows of it."""

    engine: RolloutEngine
    health: Health
    watch: EngineWatch
    done_samples: int = 0
    done_tokens: int = 0
    why_dead: str = ""


@dataclass(slots=True, eq=False)
class _Ticket:
    """One sample on its way.

    Attributes:
        sample: Its name for the dispatcher.
        request: What is wanted.
        placed: Done once `engine` is set, or there is no hope that it will be.
        engine: Who writes it; None while it waits.
        attempt: The writing.
        parts: What engines have handed over unfinished, in order.
        target: Who is to go on once the present engine has handed over; None if it was not asked to.
        failures: What engines that live on said when they failed it.
        has_ended: Whether the dispatcher has forgotten it.
    """

    sample: int
    request: RolloutRequest
    placed: asyncio.Future[None]
    engine: int | None = None
    attempt: asyncio.Task[Rollout] | None = None
    parts: list[Rollout] = field(default_factory=list)
    target: int | None = None
    failures: list[str] = field(default_factory=list)
    has_ended: bool = False


class EnginePool:
    """Dispatches samples over engines. It belongs to one event loop; only `loads` may be called from anywhere.

    Engines begin as `STALE`: none is given anything before `proven` says that it holds the current weights. One that
    dies, stalls or talks nonsense loses its samples to the others.

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
        on_lost: OnLost = lambda name, reason: None,
    ) -> None:
        assert engines, "a pool needs an engine"
        self._settings = settings
        self._seats = [_Seat(engine, Health(State.STALE), EngineWatch(settings.stall_s)) for engine in engines]
        self._index = {engine.name: index for index, engine in enumerate(engines)}
        self._why_ended = why_ended
        self._on_lost = on_lost
        self._dispatcher = Dispatcher(len(self._seats), settings.dispatch)
        self._tickets: dict[int, _Ticket] = {}
        self._names = itertools.count()
        self._prefix = secrets.token_hex(4)  # another trainer's requests may be on the same engine
        self._num_moves = 0
        self._current_version = UNPROVEN
        self._num_watchers = 0
        self._watching: list[asyncio.Task[None]] = []

    # ---- samples ----

    async def generate_group(self, requests: Sequence[RolloutRequest], *, step: int = 0) -> tuple[Rollout, ...]:
        """Write all samples of one prompt, together on one engine while that is no worse.

        Args:
            requests: One for each sample.
            step: Samples of an older one go first.

        Raises:
            EngineRequestError: The request cannot be answered, or several engines failed it in turn.
            EngineError: No engine is left. In both cases the group's other samples are cancelled.
        """
        loop = asyncio.get_running_loop()
        tickets = [_Ticket(next(self._names), request, loop.create_future()) for request in requests]
        self._tickets.update((ticket.sample, ticket) for ticket in tickets)
        self._dispatcher.submit(next(self._names), [ticket.sample for ticket in tickets], step=step)
        try:
            self._place()
            return await gather_or_cancel(self._write(ticket) for ticket in tickets)
        finally:
            for ticket in tickets:  # one that was cancelled before it began has not done so itself
                self._end(ticket)

    async def _write(self, ticket: _Ticket) -> Rollout:
        """Have one sample written, by as many engines in turn as it takes."""
        try:
            while True:
                while ticket.engine is None:
                    self._check_hope()
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

    def _outcome(self, ticket: _Ticket, index: int, attempt: asyncio.Task[Rollout]) -> Rollout | None:
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
            self._put_back(ticket)
        if seat.health.state is not State.SUSPECT:
            reason = seat.watch.failed(str(error)) or self._why_ended(seat.engine.name)
            self._happens(index, Event.FAILED)
            if reason is not None:
                self._lose(index, reason)
        if seat.health.state is not State.DEAD:
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
        if all(seat.health.state is State.DEAD for seat in self._seats):
            for ticket in self._tickets.values():
                if not ticket.placed.done():
                    ticket.placed.set_result(None)

    def _put_back(self, ticket: _Ticket) -> None:
        """Have a sample wait for another engine, before those that have not begun."""
        self._dispatcher.issue_again(ticket.sample)
        self._wait_again(ticket)

    def _wait_again(self, ticket: _Ticket) -> None:
        ticket.engine = None
        ticket.placed = asyncio.get_running_loop().create_future()

    def _hand_over(self, ticket: _Ticket, part: Rollout) -> None:
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

    def _end(self, ticket: _Ticket) -> None:
        if not ticket.has_ended:
            ticket.has_ended = True
            self._dispatcher.end(ticket.sample)
            del self._tickets[ticket.sample]
            self._place()

    def _check_hope(self) -> None:
        if all(seat.health.state is State.DEAD for seat in self._seats):
            reasons = "; ".join(f"{seat.engine.name}: {seat.why_dead}" for seat in self._seats)
            raise EngineError(f"no engine is left to write completions. {reasons}")

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
        if seat.health.state is State.DEAD:
            return
        seat.why_dead = reason
        self._happens(index, Event.DIED)
        for ticket in [ticket for ticket in self._tickets.values() if ticket.engine == index]:
            if ticket.attempt is not None and ticket.attempt.done() and not ticket.attempt.cancelled():
                continue  # its owner is about to see to it
            self._put_back(ticket)
            if ticket.attempt is not None:
                ticket.attempt.cancel()
        self._on_lost(seat.engine.name, reason)

    # ---- watching ----

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Ask the engines regularly how they are, for as long as the context lasts."""
        self._num_watchers += 1
        if self._num_watchers == 1:
            work = [*(self._watch(index) for index in range(len(self._seats))), self._balance()]
            self._watching = [asyncio.create_task(task) for task in work]
        try:
            yield
        finally:
            self._num_watchers -= 1
            if self._num_watchers == 0:
                tasks, self._watching = self._watching, []
                for task in tasks:
                    task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
                for error in (end for end in ends if isinstance(end, Exception)):
                    raise error

    async def _watch(self, index: int) -> None:
        """Look after one engine until it is dead."""
        seat = self._seats[index]
        seat.watch = EngineWatch(self._settings.stall_s)
        while seat.health.state is not State.DEAD:
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
            await asyncio.wait_for(seat.engine.cut(ticket.attempt.get_name()), _REPORT_TIMEOUT_S)
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
        limit_s = min(_REPORT_TIMEOUT_S, self._settings.stall_s)
        asked_at = time.monotonic()
        try:
            report: EngineReport = await asyncio.wait_for(seat.engine.report(), limit_s)
        except (EngineFaultError, TimeoutError) as error:
            self._happens(index, Event.FAILED)
            why = str(error) or f"no report within {limit_s:g} s"
            return seat.watch.silent(why, since=asked_at, now=time.monotonic())
        self._happens(index, Event.ANSWERED)
        self._dispatcher.report(index, report)
        return seat.watch.answered(report, in_flight=self._dispatcher.in_flight(index), now=time.monotonic())
