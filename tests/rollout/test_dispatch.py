"""Which engine writes which sample: spread, kept together, bounded, oldest first, issued again, moved."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.rollout.dispatch import Dispatcher, DispatchSettings
from shoal.types import EngineReport


def dispatcher(num_engines: int, *, max_in_flight: int = 8, margin: int = 2) -> Dispatcher:
    made = Dispatcher(num_engines, DispatchSettings(max_in_flight=max_in_flight, affinity_margin=margin))
    for engine in range(num_engines):
        made.open(engine)
    return made


def homes(made: Dispatcher, now: float = 0.0) -> dict[int, int]:
    """Return who writes what from now on."""
    return {assignment.sample: assignment.engine for assignment in made.assign(now)}


def report(running: int, *, waiting: int = 0, kv_usage: float = 0.0, num_preemptions: int = 0) -> EngineReport:
    return EngineReport(running=running, waiting=waiting, kv_usage=kv_usage, num_preemptions=num_preemptions)


def test_prompts_spread_over_the_engines_and_the_samples_of_each_stay_together() -> None:
    made = dispatcher(4, max_in_flight=100)
    for prompt in range(8):
        made.submit(prompt, range(10 * prompt, 10 * prompt + 5))
    where = homes(made)
    for prompt in range(8):
        assert len({where[10 * prompt + sample] for sample in range(5)}) == 1
    assert Counter(where.values()) == dict.fromkeys(range(4), 10)


@pytest.mark.parametrize("margin", [0, 1, 3])
def test_a_prompt_leaves_its_engine_when_another_has_fewer_samples_by_more_than_the_margin(margin: int) -> None:
    made = dispatcher(2, max_in_flight=100, margin=margin)
    made.submit(0, range(margin + 1))
    assert set(homes(made).values()) == {0}
    made.submit(1, [100])
    assert homes(made) == {100: 1}
    made = dispatcher(2, max_in_flight=100, margin=margin)
    made.submit(0, range(margin + 2))
    assert list(homes(made).values()) == [0] * (margin + 1) + [1]


def test_a_free_slot_goes_to_a_prompt_that_its_engine_has_before_one_that_is_new() -> None:
    made = dispatcher(2, max_in_flight=1)
    made.submit(0, [0, 1])
    made.submit(1, [10, 11])
    made.submit(2, [20, 21])
    assert homes(made) == {0: 0, 10: 1}
    made.end(10)
    assert homes(made) == {11: 1}
    made.end(11)
    assert homes(made) == {20: 1}  # a new prompt, since sample 1 has a home that will be free


def test_no_engine_idles_for_the_sake_of_another_ones_prompt() -> None:
    made = dispatcher(2, max_in_flight=1, margin=100)
    made.submit(0, [0, 1, 2])
    assert homes(made) == {0: 0, 1: 1}


def test_the_oldest_step_goes_first_then_the_longest_expected_then_the_first_to_come() -> None:
    made = dispatcher(1, max_in_flight=1)
    made.submit(0, [0], step=5)
    made.submit(1, [1], step=4)
    made.submit(2, [2], step=4, expected_tokens=900)
    made.submit(3, [3], step=4)
    order = []
    while now_sent := homes(made):
        (sample,) = now_sent
        order.append(sample)
        made.end(sample)
    assert order == [2, 1, 3, 0]


def test_an_older_step_goes_before_a_prompt_that_the_engine_has() -> None:
    made = dispatcher(1, max_in_flight=1)
    made.submit(0, [0, 1], step=5)
    assert homes(made) == {0: 0}
    made.submit(1, [10], step=4)
    made.end(0)
    assert homes(made) == {10: 0}


def test_cancelling_frees_the_slot_at_once_and_what_waits_is_forgotten() -> None:
    made = dispatcher(1, max_in_flight=2)
    made.submit(0, range(5))
    assert homes(made) == {0: 0, 1: 0}
    made.end(3)
    made.end(0)
    assert homes(made) == {2: 0}
    made.end(1)
    made.end(2)
    assert homes(made) == {4: 0}
    assert made.num_waiting == 0


def test_a_closed_engine_is_given_nothing_and_what_it_had_goes_before_what_has_not_begun() -> None:
    made = dispatcher(2, max_in_flight=2)
    made.submit(0, [0, 1])
    made.submit(1, [10, 11])
    made.submit(2, [20, 21])
    where = homes(made)
    lost = made.samples_of(0)
    assert lost and all(where[sample] == 0 for sample in lost)
    made.close(0)
    for sample in lost:
        made.issue_again(sample)
    assert homes(made) == {}
    for sample in made.samples_of(1):
        made.end(sample)
    assert homes(made) == dict.fromkeys(lost, 1)


@pytest.mark.parametrize(
    ("said", "room"),
    [
        (report(4, kv_usage=0.1), 16),
        (report(4, kv_usage=0.45), 4),  # 8 fit into 0.9 of the cache
        (report(4, kv_usage=0.9), 0),
        (report(3, waiting=1, kv_usage=0.1), 0),
        (report(4, kv_usage=0.1, num_preemptions=2), 0),
        (report(10, kv_usage=0.1), 10),  # 6 are others'
        (report(0), 16),
    ],
    ids=str,
)
def test_the_bound_of_an_engine_follows_its_memory_its_queue_and_what_others_ask_of_it(
    said: EngineReport, room: int
) -> None:
    made = dispatcher(1, max_in_flight=20)
    made.submit(0, range(4))
    assert len(homes(made)) == 4
    made.report(0, said)
    made.submit(1, range(100, 200))
    assert len(homes(made)) == room


def test_a_bound_never_closes_an_engine_for_good() -> None:
    made = dispatcher(1, max_in_flight=20)
    made.submit(0, [0])
    assert homes(made) == {0: 0}
    made.report(0, report(1, kv_usage=1.0))
    made.submit(1, range(100, 104))
    assert homes(made) == {}
    made.end(0)
    assert len(homes(made)) == 1


def test_a_report_older_than_what_has_ended_since_makes_nobody_a_stranger() -> None:
    made = dispatcher(2, max_in_flight=20, margin=0)
    made.submit(0, range(4))
    where = homes(made)
    mine = [sample for sample, engine in where.items() if engine == 0]
    for sample in mine:
        made.end(sample)
    made.report(0, report(len(mine)))
    made.submit(1, [100])
    assert homes(made) == {100: 0}  # the control: with strangers it would not be the least loaded


# ---- moving ----


def loaded(usages: Iterable[float], begun: Iterable[Iterable[float]]) -> Dispatcher:
    """Return engines that use these shares of their caches, with samples begun at these times (100 for each engine)."""
    shares, times = list(usages), [list(ages) for ages in begun]
    made = dispatcher(len(shares), max_in_flight=100, margin=0)
    for engine in range(len(shares)):
        made.close(engine)
    for engine, ages in enumerate(times):
        made.open(engine)
        for index, at in enumerate(ages):
            made.submit(100 * engine + index, [100 * engine + index])
            made.assign(at)
        made.close(engine)
    for engine, usage in enumerate(shares):
        made.open(engine)
        made.report(engine, report(len(times[engine]), kv_usage=usage))
    return made


def test_the_fullest_engine_gives_the_sample_that_evens_it_out_best_to_the_emptiest() -> None:
    made = loaded([0.8, 0.2, 0.5], [[0.0, 50.0, 70.0], [0.0], [0.0]])
    (move,) = made.moves(100.0)
    # Ages 100, 50 and 30 share 0.8: 0.44, 0.22 and 0.13. Half of the gap is 0.3.
    assert (move.sample, move.source, move.target) == (1, 0, 1)
    assert made.move(move.sample, move.target)
    assert made.samples_of(0) == [0, 2] and made.samples_of(1) == [100, 1]


def test_nothing_moves_while_samples_wait_or_are_young_or_engines_are_even() -> None:
    assert loaded([0.8, 0.2], [[0.0, 50.0, 70.0], [0.0]]).moves(100.0)  # the control
    waits = loaded([0.8, 0.2], [[0.0, 50.0, 70.0], [0.0]])
    waits.close(0)
    waits.close(1)
    waits.submit(999, [999])
    assert waits.moves(100.0) == []
    assert loaded([0.8, 0.2], [[97.0, 98.0, 99.0], [0.0]]).moves(100.0) == []
    assert loaded([0.5, 0.499], [[0.0, 50.0, 70.0], [0.0]]).moves(100.0) == []


def test_an_engine_that_has_moved_waits_for_reports_that_show_it() -> None:
    made = loaded([0.8, 0.2], [[0.0, 50.0, 70.0], [0.0]])
    assert made.moves(100.0)
    assert made.moves(101.0) == []
    for _ in range(2):
        assert made.moves(101.0) == []
        made.report(0, report(3, kv_usage=0.8))
        made.report(1, report(1, kv_usage=0.2))
    assert made.moves(102.0)


def test_an_engine_that_keeps_what_it_has_begun_gives_nothing_away() -> None:
    made = loaded([0.8, 0.2], [[0.0, 50.0, 70.0], [0.0]])
    made.keep(0)
    assert made.moves(100.0) == []


def test_a_move_to_an_engine_that_was_lost_meanwhile_makes_the_sample_wait() -> None:
    made = loaded([0.8, 0.2], [[0.0, 50.0, 70.0], [0.0]])
    (move,) = made.moves(100.0)
    made.close(1)
    assert not made.move(move.sample, move.target)
    assert homes(made, 101.0) == {move.sample: 0}


# ---- whatever happens ----


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32))
def test_whatever_happens_every_sample_is_in_one_place_and_no_bound_is_broken(seed: int) -> None:
    chance = random.Random(seed)
    num_engines, most = chance.randint(1, 5), chance.randint(1, 4)
    made = dispatcher(num_engines, max_in_flight=most, margin=chance.randint(0, 3))
    is_open = [True] * num_engines
    waiting: set[int] = set()
    under_way: dict[int, int] = {}
    names = iter(range(10**6))
    for now in range(60):
        act = chance.choice(("submit", "end", "cancel", "close", "open", "report", "again"))
        if act == "submit":
            samples = [next(names) for _ in range(chance.randint(0, 5))]
            made.submit(next(names), samples, step=chance.randint(0, 2), expected_tokens=chance.random())
            waiting.update(samples)
        elif act == "end" and under_way:
            made.end(sample := chance.choice(sorted(under_way)))
            del under_way[sample]
        elif act == "cancel" and waiting:
            made.end(sample := chance.choice(sorted(waiting)))
            waiting.remove(sample)
        elif act in ("close", "open"):
            engine = chance.randrange(num_engines)
            getattr(made, act)(engine)
            is_open[engine] = act == "open"
        elif act == "again" and under_way:
            made.issue_again(sample := chance.choice(sorted(under_way)))
            del under_way[sample]
            waiting.add(sample)
        elif act == "report":
            engine = chance.randrange(num_engines)
            made.report(engine, report(made.in_flight(engine), kv_usage=chance.random() * 0.1))
        for sample, engine in homes(made, float(now)).items():
            assert is_open[engine] and sample in waiting
            waiting.remove(sample)
            under_way[sample] = engine
        assert made.num_waiting == len(waiting)
        for engine in range(num_engines):
            assert sorted(made.samples_of(engine)) == sorted(s for s, e in under_way.items() if e == engine)
            assert made.in_flight(engine) <= most
        if waiting:  # then no open engine has room
            assert all(made.in_flight(e) == most for e in range(num_engines) if is_open[e])


def test_the_same_events_give_the_same_choices() -> None:
    def run() -> list[tuple[int, int]]:
        chance = random.Random(7)
        made = dispatcher(16, max_in_flight=4)
        choices = []
        for prompt in range(64):
            made.submit(prompt, range(8 * prompt, 8 * prompt + 8))
        while sent := homes(made):
            choices += list(sent.items())
            for engine in range(16):
                if mine := made.samples_of(engine):
                    made.end(chance.choice(mine))
        return choices

    first = run()
    assert first == run()
    assert len(first) == 512


def dispatching_s(num_engines: int) -> float:
    """Return the CPU time of a sample where each engine writes 64, of which it has 32 under way."""
    made = dispatcher(num_engines, max_in_flight=32)
    num_samples = 64 * num_engines
    began = time.process_time()
    for prompt in range(num_samples // 8):
        made.submit(prompt, range(8 * prompt, 8 * prompt + 8))
    num_sent = len(homes(made))
    while num_sent < num_samples:
        for engine in range(num_engines):
            for sample in made.samples_of(engine)[:4]:
                made.end(sample)
            num_sent += len(homes(made))
            made.report(engine, report(made.in_flight(engine), kv_usage=0.5))
    return (time.process_time() - began) / num_samples


def test_the_cost_of_a_sample_hardly_grows_with_the_number_of_engines() -> None:
    """How many microseconds it is, `shoal bench rollouts --simulate` says; here, that none goes through all engines."""
    few = min(dispatching_s(64) for _ in range(3))
    many = min(dispatching_s(1024) for _ in range(2))
    assert many < 5 * few, (few, many)  # a walk over all of them would make it sixteen times as much


def test_an_engine_that_is_renewed_is_filled_as_one_that_never_reported() -> None:
    dispatcher = Dispatcher(1, DispatchSettings(max_in_flight=4, affinity_margin=0))
    dispatcher.open(0)
    dispatcher.report(0, EngineReport(running=0, waiting=3, kv_usage=0.9, num_preemptions=7))
    dispatcher.keep(0)
    dispatcher.submit(0, range(4))
    assert len(dispatcher.assign(0.0)) == 0  # three of others wait there
    dispatcher.renew(0)
    assert len(dispatcher.assign(0.0)) == 4
    dispatcher.report(0, EngineReport(running=4, waiting=0, kv_usage=0.1, num_preemptions=0))
    dispatcher.submit(1, [10])
    assert dispatcher.assign(0.0) == []
