"""Engines that were lost and come back: every trainer rank leaves them, meets them again and sends them the weights.

All ranks take part in sending, while rank 0 alone knows of engines. So whenever rank 0 waits for its engines, the
others wait for what it orders: to refill one that has come back, and at last to go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from shoal.errors import NoEngineError, ShoalError
from shoal.protocols import Ranks
from shoal.trainer.exchange import RankLostError
from shoal.trainer.rollouts import Rollouts
from shoal.weights.publisher import WeightPublisher

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_TICK_S = 20.0
"""How often the waiting ranks hear of rank 0: well within the time-out of any process group."""


class Comebacks:
    """What all ranks do about engines that are lost and come back. Every rank has one, once engines run.

    Args:
        ranks: The trainer's.
        publisher: This rank's.
        rollouts: The engines, on rank 0.
        tick_s: Longest that the other ranks hear nothing.
    """

    def __init__(
        self, ranks: Ranks, publisher: WeightPublisher, rollouts: Rollouts | None, *, tick_s: float = _TICK_S
    ) -> None:
        self._ranks = ranks
        self._publisher = publisher
        self._rollouts = rollouts
        self._tick_s = tick_s
        self._is_attended = ranks.num_ranks == 1
        self._ordered_at = 0.0

    def muster(self) -> None:
        """Before a publish: leave the engines that are gone and meet those that have come back. A collective.

        If none is there, one that is on its way is waited for.

        Raises:
            NoEngineError: None is there, and none is on its way. On all ranks.
        """
        while True:
            call = self._ranks.json(self._roll_call)
            if call["hopeless"]:
                raise NoEngineError(call["hopeless"])
            if call["gone"]:
                self._publisher.leave(call["gone"])
            for name in call["back"]:
                self._meet(name)
            if self._publisher.live_engines or (call["is_one_there"] and not call["back"]):
                return

    def during(self, work: Callable[[], _T]) -> Callable[[], _T]:
        """Do something on rank 0 that waits for engines, while all ranks refill those that come back. A collective.

        Returns:
            What returns on rank 0 what `work` has returned, or raises what it has raised. Not to be called elsewhere.

        Raises:
            NoEngineError: `work` did. On all ranks.
        """
        if self._ranks.rank != 0:
            while (order := self._ranks.json(_only_on_rank_zero))["do"] != "go on":
                self._carry_out(order)
            if order["hopeless"]:
                raise NoEngineError(order["hopeless"])
            return _only_on_rank_zero
        outcome = self._attended(work)
        error = outcome if isinstance(outcome, NoEngineError) else None
        self._ranks.json(lambda: {"do": "go on", "hopeless": str(error or "")})
        if error is not None:
            raise error
        return lambda: _given(outcome)

    def meanwhile(self) -> None:
        """On rank 0, several times a second while it waits for engines: have those that are back refilled."""
        if self._rollouts is None or not self._is_attended:
            return
        for name in self._rollouts.take_back():
            self._order({"do": "refill", "engine": name, "version": self._rollouts.version})
        if time.monotonic() - self._ordered_at > self._tick_s:
            self._order({"do": "wait"})

    def _attended(self, work: Callable[[], _T]) -> _T | BaseException:
        before, self._is_attended = self._is_attended, True
        self._ordered_at = time.monotonic()
        try:
            return work()
        except BaseException as error:
            return error
        finally:
            self._is_attended = before

    def _order(self, order: dict[str, Any]) -> None:
        self._carry_out(self._ranks.json(lambda: order))
        self._ordered_at = time.monotonic()

    def _carry_out(self, order: dict[str, Any]) -> None:
        if order["do"] == "refill":
            self._refill(order["engine"], order["version"])

    def _roll_call(self) -> dict[str, Any]:
        assert self._rollouts is not None
        try:
            call = self._rollouts.roll_call(patience_s=self._tick_s)
        except NoEngineError as error:
            return {"hopeless": str(error)}
        return {"hopeless": "", "gone": call.gone, "back": call.back, "is_one_there": call.is_one_there}

    def _meet(self, name: str) -> None:
        def meet() -> None:
            self._publisher.admit(name, self._rollouts.address(name) if self._rollouts is not None else None)

        self._unless_it_fails(name, meet)

    def _refill(self, name: str, version: int) -> None:
        def refill() -> None:
            address = self._rollouts.address(name) if self._rollouts is not None else None
            self._publisher.refill(name, address, version)
            if self._rollouts is not None:
                self._rollouts.refilled(name, version)

        self._unless_it_fails(name, refill)

    def _unless_it_fails(self, name: str, act: Callable[[], None]) -> None:
        """Do something with an engine. If that fails, it does so on all ranks, and the engine is lost again."""
        try:
            act()
        except RankLostError:
            raise
        except ShoalError as error:
            if self._rollouts is not None:
                self._rollouts.lost({name: str(error)})


def _only_on_rank_zero() -> Any:
    raise AssertionError("only rank 0 has something to say")


def _given(outcome: Any) -> Any:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
