"""The time ledger, on a clock that moves only when told."""

import threading

import pytest

from shoal.observe.ledger import TimeLedger


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_phase_adds_up_over_its_visits(clock: Clock) -> None:
    ledger = TimeLedger(clock=clock)
    for seconds in (1.0, 2.0):
        with ledger.phase("train"):
            clock.now += seconds
        clock.now += 10
    assert ledger.seconds() == {"train": 3.0}


def test_a_nested_phase_is_not_counted_twice(clock: Clock) -> None:
    ledger = TimeLedger(clock=clock)
    with ledger.phase("step"):
        clock.now += 1
        with ledger.phase("publish"):
            clock.now += 5
        clock.now += 2
    assert ledger.seconds() == {"step": 3.0, "publish": 5.0}


def test_a_phase_inside_itself_counts_once(clock: Clock) -> None:
    ledger = TimeLedger(clock=clock)
    with ledger.phase("train"), ledger.phase("train"):
        clock.now += 4
    assert ledger.seconds() == {"train": 4.0}


def test_phases_that_interleave_as_tasks_do_share_the_time(clock: Clock) -> None:
    ledger = TimeLedger(clock=clock)
    first, second = ledger.phase("reward"), ledger.phase("generate")
    first.__enter__()
    clock.now += 1
    second.__enter__()
    clock.now += 2
    first.__exit__(None, None, None)  # the one opened first ends first
    clock.now += 4
    second.__exit__(None, None, None)
    clock.now += 8
    assert ledger.seconds() == {"reward": 1.0, "generate": 6.0}


def test_an_open_phase_is_counted_up_to_now_and_on(clock: Clock) -> None:
    ledger = TimeLedger(clock=clock)
    with ledger.phase("generate"):
        clock.now += 3
        assert ledger.seconds() == {"generate": 3.0}
        clock.now += 1
    assert ledger.seconds() == {"generate": 4.0}


def test_an_exception_ends_the_phase(clock: Clock) -> None:
    ledger = TimeLedger(clock=clock)
    with pytest.raises(KeyError), ledger.phase("train"):
        clock.now += 2
        raise KeyError
    clock.now += 7
    assert ledger.seconds() == {"train": 2.0}


def test_threads_do_not_take_time_from_one_another(clock: Clock) -> None:
    ledger = TimeLedger(clock=clock)
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with ledger.phase("generate"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with ledger.phase("train"):
        thread.start()
        assert entered.wait(10)
        clock.now += 5
        leave.set()
        thread.join()
    assert ledger.seconds() == {"train": 5.0, "generate": 5.0}


def test_time_measured_elsewhere_is_added(clock: Clock) -> None:
    ledger = TimeLedger(clock=clock)
    ledger.add("publish", 1.5)
    ledger.add("publish", 1.5)
    assert ledger.seconds() == {"publish": 3.0}
