"""How often, how patiently and until when a lost engine is started anew."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from shoal.engines.restarts import Restarts, RestartSettings
from shoal.errors import EngineStartError
from shoal.testing.fleet import fake_fleet, fake_processes


class Fleet:
    """Starts engines as it is told: each outcome is one attempt's."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)
        self.tried_at: list[float] = []

    def restart(self, name: str, *, timeout_s: float, stop: threading.Event) -> Any:
        self.tried_at.append(time.monotonic())
        if (outcome := self.outcomes.pop(0)) is not None:
            raise outcome
        return name


def restarts_of(fleet: Any, **changes: Any) -> tuple[Restarts, list[tuple[str, str]]]:
    given_up: list[tuple[str, str]] = []
    settings = {"max_in_a_row": 3, "timeout_s": 5.0, "first_wait_s": 0.05} | changes
    restarts = Restarts(
        fleet, RestartSettings(**settings), on_given_up=lambda name, reason: given_up.append((name, reason))
    )
    return restarts, given_up


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return value


def test_an_engine_comes_back_once_and_is_handed_out_once() -> None:
    restarts, given_up = restarts_of(fleet := fake_fleet(2))
    fake_processes(fleet)[0].status = 1
    assert restarts.begin("engine-0", "it died")
    (ready,) = until(restarts.take_ready)
    assert ready is fleet.engines[0] and ready.name == "engine-0"
    assert restarts.take_ready() == [] and restarts.num_restarted == 1 and given_up == []


def test_each_attempt_waits_twice_as_long_as_the_one_before_it() -> None:
    fleet = Fleet(EngineStartError("no"), OSError("no port"), None)
    restarts, given_up = restarts_of(fleet, first_wait_s=0.2)
    began = time.monotonic()
    assert restarts.begin("a", "it died")
    assert until(restarts.take_ready) == ["a"]
    moments = [began, *fleet.tried_at]
    waits = [after - before for before, after in itertools.pairwise(moments)]
    assert [wait >= least for wait, least in zip(waits, (0.2, 0.4, 0.8), strict=True)] == [True] * 3
    assert given_up == []


@pytest.mark.parametrize("error", [EngineStartError("the port is taken"), KeyError("the port is taken")])
def test_after_its_last_attempt_it_is_given_up_with_the_last_reason(error: Exception) -> None:
    restarts, given_up = restarts_of(Fleet(EngineStartError("first"), error), max_in_a_row=2)
    assert restarts.begin("a", "it died")
    ((name, reason),) = until(lambda: given_up)
    assert name == "a" and reason.startswith("2 attempts to restart it failed") and "the port is taken" in reason
    assert not restarts.begin("a", "it died again")


def test_one_that_keeps_dying_soon_after_it_serves_is_given_up_and_one_that_has_served_long_is_not() -> None:
    for settled_s, begins in ((600.0, [True, True, False]), (0.0, [True] * 3)):
        restarts, _ = restarts_of(Fleet(None, None, None), max_in_a_row=2, settled_s=settled_s)
        outcomes = []
        for _ in range(3):
            outcomes.append(restarts.begin("a", "it died"))
            if outcomes[-1]:
                until(restarts.take_ready)
                restarts.serves("a")
        assert outcomes == begins


def test_with_no_attempts_allowed_nothing_is_begun() -> None:
    restarts, given_up = restarts_of(Fleet(), max_in_a_row=0)
    assert not restarts.begin("a", "it died") and given_up == []


def test_closing_ends_the_wait_between_attempts_and_what_is_under_way() -> None:
    started, stopped = threading.Event(), threading.Event()

    class Slow:
        def restart(self, name: str, *, timeout_s: float, stop: threading.Event) -> Any:
            started.set()
            assert stop.wait(20)
            stopped.set()
            raise EngineStartError("not wanted any more")

    for fleet, first_wait_s in ((cast(Any, Slow()), 0.0), (cast(Any, Fleet()), 60.0)):
        restarts, given_up = restarts_of(fleet, first_wait_s=first_wait_s, longest_wait_s=60.0)
        assert restarts.begin("a", "it died")
        assert first_wait_s or started.wait(20)
        began = time.monotonic()
        restarts.close()
        assert time.monotonic() - began < 45 and given_up == []
        assert not restarts.begin("b", "it died")
        assert not [thread for thread in threading.enumerate() if thread.name == "restart a"]
    assert stopped.is_set()
