"""Several engines as one: together while no worse, bounded, cancelled as a whole, counted."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import EngineError, EngineFaultError, EngineRequestError, NoEngineError
from shoal.rollout.dispatch import DispatchSettings
from shoal.rollout.health import State
from shoal.rollout.parts import go_on
from shoal.rollout.pool import EnginePool, PoolSettings
from shoal.testing import FakeEngine
from shoal.types import EngineReport, Rollout, RolloutRequest, SamplingSettings

SAMPLING = SamplingSettings(temperature=1.0, max_tokens=12, stop_token_ids=(2,))


def request(seed: int) -> RolloutRequest:
    return RolloutRequest(prompt_token_ids=(5, seed), seed=seed, sampling=SAMPLING)


def group(first_seed: int, size: int) -> list[RolloutRequest]:
    return [request(first_seed + sample) for sample in range(size)]


def pool_of(
    engines: Sequence[Any],
    *,
    max_in_flight: int = 8,
    margin: int = 2,
    stall_s: float = 30.0,
    poll_s: float = 0.05,
    **watching: Any,
) -> EnginePool:
    """Return a pool of engines that hold the current weights."""
    dispatch = DispatchSettings(max_in_flight=max_in_flight, affinity_margin=margin)
    pool = EnginePool(engines, PoolSettings(dispatch=dispatch, stall_s=stall_s, poll_s=poll_s), **watching)
    pool.publishing(0)
    pool.proven(0, [engine.name for engine in engines])
    return pool


def test_each_sample_gets_its_own_requests_completion_in_order() -> None:
    # The later a sample is asked for, the sooner it is done.
    engines = [FakeEngine(f"e{i}", delay_s=lambda seed: 0.03 - 0.004 * seed) for i in range(2)]
    pool = pool_of(engines, max_in_flight=2)

    async def run() -> tuple[tuple[Rollout, ...], list[Rollout]]:
        rollouts = await pool.generate_group(group(0, 6))
        return rollouts, [await FakeEngine("alone").generate(request(seed)) for seed in range(6)]

    rollouts, alone = asyncio.run(run())
    assert [r.token_ids.tolist() for r in rollouts] == [a.token_ids.tolist() for a in alone]
    assert len({tuple(a.token_ids) for a in alone}) == 6


@pytest.mark.parametrize("margin", [0, 2, 5])
def test_the_samples_of_one_prompt_stay_together_up_to_the_margin_and_then_spread(margin: int) -> None:
    engines = [FakeEngine(f"e{i}", delay_s=lambda seed: 0.02) for i in range(2)]
    asyncio.run(pool_of(engines, margin=margin).generate_group(group(0, margin + 1)))
    assert [len(engine.requests) for engine in engines] == [margin + 1, 0]

    engines = [FakeEngine(f"e{i}", delay_s=lambda seed: 0.02) for i in range(2)]
    asyncio.run(pool_of(engines, max_in_flight=100, margin=margin).generate_group(group(0, 20)))
    loads = [len(engine.requests) for engine in engines]
    assert sum(loads) == 20
    assert 0 < abs(loads[0] - loads[1]) <= margin + 1 or loads == [10, 10]


def test_two_prompts_that_come_together_go_to_two_engines_and_stay_there() -> None:
    engines = [FakeEngine(f"e{i}", delay_s=lambda seed: 0.02) for i in range(2)]
    pool = pool_of(engines, margin=4)

    async def run() -> tuple[tuple[Rollout, ...], ...]:
        return await asyncio.gather(pool.generate_group(group(0, 4)), pool.generate_group(group(100, 4)))

    homes = [{rollout.engine for rollout in rollouts} for rollouts in asyncio.run(run())]
    assert sorted(map(sorted, homes)) == [["e0"], ["e1"]]


def test_a_sample_does_not_wait_for_its_home_while_another_engine_is_free() -> None:
    slow = FakeEngine("slow", delay_s=lambda seed: 0.3)
    fast = FakeEngine("fast", delay_s=lambda seed: 0.0)
    pool = pool_of([slow, fast], max_in_flight=1, margin=100)
    asyncio.run(pool.generate_group(group(0, 10)))
    assert len(slow.requests) == 1
    assert len(fast.requests) == 9


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 3),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(1, 3),
)
def test_no_engine_ever_has_more_in_flight_than_allowed_and_all_of_them_are_used(
    num_engines: int, max_in_flight: int, margin: int, sizes: list[int], kind: int
) -> None:
    engines = [FakeEngine(f"e{i}", delay_s=lambda seed: (seed * kind % 4) * 0.001) for i in range(num_engines)]
    pool = pool_of(engines, max_in_flight=max_in_flight, margin=margin)

    async def run() -> list[tuple[Rollout, ...]]:
        groups = [pool.generate_group(group(100 * i, size)) for i, size in enumerate(sizes)]
        return list(await asyncio.gather(*groups))

    results = asyncio.run(run())
    assert [len(rollouts) for rollouts in results] == sizes
    assert max(engine.most_running for engine in engines) <= max_in_flight
    assert sum(len(engine.requests) for engine in engines) == sum(sizes)
    if sum(sizes) > num_engines * max_in_flight:
        assert all(engine.most_running == max_in_flight for engine in engines)
    assert [load.running for load in pool.loads()] == [0] * num_engines


def test_without_the_bound_an_engine_would_take_everything_at_once() -> None:
    engine = FakeEngine("e", delay_s=lambda seed: 0.02)
    asyncio.run(pool_of([engine], max_in_flight=100).generate_group(group(0, 30)))
    assert engine.most_running == 30  # the control of the test above


def test_loads_count_what_runs_and_what_is_done() -> None:
    engines = [FakeEngine("a", delay_s=lambda seed: 0.1), FakeEngine("b", delay_s=lambda seed: 0.1)]
    pool = pool_of(engines, max_in_flight=2, margin=0)

    async def run() -> tuple[list[int], tuple[Rollout, ...]]:
        task = asyncio.create_task(pool.generate_group(group(0, 7)))
        await asyncio.sleep(0.03)
        running = [load.running for load in pool.loads()]
        return running, await task

    running, rollouts = asyncio.run(run())
    assert running == [2, 2]
    for load in pool.loads():
        mine = [rollout for rollout in rollouts if rollout.engine == load.name]
        assert load.done_samples == len(mine) > 0
        assert load.done_tokens == sum(len(rollout.token_ids) for rollout in mine)
        assert load.running == 0


class Refusing(FakeEngine):
    """Refuses what any engine would refuse."""

    async def generate(self, request: RolloutRequest) -> Rollout:
        rollout = await super().generate(request)
        if request.seed in REFUSED:
            raise EngineRequestError(f"{self.name} refuses sample {request.seed}")
        return rollout


REFUSED = (3, 50)


def test_a_request_that_is_refused_cancels_the_rest_of_its_group_and_raises_its_error() -> None:
    engines = [Refusing(f"e{i}", delay_s=lambda seed: 0.01 if seed == 3 else 300.0) for i in range(2)]
    pool = pool_of(engines, max_in_flight=3)

    async def run() -> None:
        with pytest.raises(EngineRequestError, match=r"e[01] refuses sample 3"):
            await asyncio.wait_for(pool.generate_group(group(0, 60)), timeout=60)
        assert [engine.running for engine in engines] == [0, 0]
        assert [load.running for load in pool.loads()] == [0, 0]
        assert sum(len(engine.requests) for engine in engines) <= 7  # those that waited were never sent
        assert len(asyncio.all_tasks()) == 1  # nothing is left behind

    asyncio.run(run())
    assert sum(load.done_samples for load in pool.loads()) == 0


def test_one_groups_failure_leaves_another_group_alone() -> None:
    engine = Refusing("e", delay_s=lambda seed: 0.02)
    pool = pool_of([engine], max_in_flight=3)

    async def run() -> tuple[tuple[Rollout, ...] | BaseException, ...]:
        return await asyncio.gather(
            pool.generate_group(group(48, 3)), pool.generate_group(group(60, 5)), return_exceptions=True
        )

    failed, fine = asyncio.run(run())
    assert isinstance(failed, EngineRequestError)
    assert isinstance(fine, tuple) and len(fine) == 5


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 12), st.integers(1, 3))
def test_a_group_cancelled_at_any_moment_gives_every_slot_back(ticks: int, max_in_flight: int) -> None:
    engines = [FakeEngine(f"e{i}", delay_s=lambda seed: 0.001 * (seed % 3)) for i in range(2)]
    pool = pool_of(engines, max_in_flight=max_in_flight)

    async def run() -> int:
        task = asyncio.create_task(pool.generate_group(group(0, 12)))
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        for _ in range(2):  # an impatient owner cancels again
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.01)
        assert [load.running for load in pool.loads()] == [0, 0]
        return len(await asyncio.wait_for(pool.generate_group(group(50, 6)), timeout=60))

    assert asyncio.run(run()) == 6


def test_seeds_reach_the_engines_once_each() -> None:
    engines = [FakeEngine(f"e{i}") for i in range(3)]
    asyncio.run(pool_of(engines, margin=0).generate_group(group(10, 9)))
    assert Counter(r.seed for engine in engines for r in engine.requests) == Counter(range(10, 19))


# ---- engines that come and go ----


def states(pool: EnginePool) -> list[State]:
    return [load.state for load in pool.loads()]


def test_no_engine_is_asked_anything_before_it_is_proven_to_hold_the_current_weights() -> None:
    engines = [FakeEngine(f"e{i}") for i in range(3)]
    pool = EnginePool(engines, PoolSettings(dispatch=DispatchSettings(max_in_flight=4, affinity_margin=0), stall_s=9))

    async def run() -> tuple[Rollout, ...]:
        task = asyncio.create_task(pool.generate_group(group(0, 6)))
        await asyncio.sleep(0.01)
        assert sum(len(engine.requests) for engine in engines) == 0 and states(pool) == [State.STALE] * 3
        pool.publishing(4)
        pool.proven(3, ["e0"])  # an older version does not serve
        pool.proven(4, ["e2"])
        assert states(pool) == [State.STALE, State.STALE, State.READY]
        return await asyncio.wait_for(task, 60)

    assert {rollout.engine for rollout in asyncio.run(run())} == {"e2"}


def test_while_weights_are_published_what_runs_goes_on_and_what_waits_waits() -> None:
    engines = [FakeEngine(f"e{i}", delay_s=lambda seed: 0.02) for i in range(2)]
    pool = pool_of(engines, max_in_flight=2)

    async def run() -> tuple[Rollout, ...]:
        task = asyncio.create_task(pool.generate_group(group(0, 9)))
        await asyncio.sleep(0.005)
        pool.publishing(1)
        await asyncio.sleep(0.05)
        assert [len(engine.requests) for engine in engines] == [2, 2]
        assert [load.done_samples for load in pool.loads()] == [2, 2]
        pool.proven(1, ["e0"])
        assert states(pool) == [State.READY, State.PAUSED]
        return await asyncio.wait_for(task, 60)

    homes = Counter(rollout.engine for rollout in asyncio.run(run()))
    assert homes == {"e0": 7, "e1": 2}


class Mortal(FakeEngine):
    """An engine that can be killed (its connections break), frozen (it says nothing) or made to talk nonsense."""

    def __init__(self, name: str, *, delay_s: Callable[[int], float]) -> None:
        super().__init__(name, delay_s=delay_s)
        self.fate = ""
        self._ill = asyncio.Event()

    def suffer(self, fate: str) -> None:
        self.fate = fate
        self._ill.set()

    async def report(self) -> EngineReport:
        await self._symptom()
        return await super().report()

    async def generate(self, request: RolloutRequest) -> Rollout:
        work = asyncio.create_task(super().generate(request))
        illness = asyncio.create_task(self._ill.wait())
        try:
            await asyncio.wait([work, illness], return_when=asyncio.FIRST_COMPLETED)
            await self._symptom()
            return await work
        finally:
            work.cancel()
            illness.cancel()
            await asyncio.gather(work, illness, return_exceptions=True)

    async def _symptom(self) -> None:
        if self.fate == "killed":
            raise EngineFaultError(f"{self.name}: connection refused")
        if self.fate == "nonsense":
            raise EngineFaultError(f"{self.name} answered with something that is not JSON")
        if self.fate == "frozen":
            await asyncio.sleep(3600)


FATES = ("killed", "frozen", "nonsense")


@pytest.mark.parametrize("fate", FATES)
def test_what_a_lost_engine_was_writing_is_written_by_others_and_it_is_asked_nothing_more(fate: str) -> None:
    lost: dict[str, str] = {}

    async def run() -> tuple[Rollout, ...]:
        engines = [Mortal(f"e{i}", delay_s=lambda seed: 0.05) for i in range(3)]
        pool = pool_of(
            engines, max_in_flight=4, stall_s=1.5, on_lost=lambda name, reason: bool(lost.__setitem__(name, reason))
        )
        async with pool.watching():
            task = asyncio.create_task(pool.generate_group(group(0, 24)))
            await until(lambda: engines[1].running == 4)  # it has work to lose
            engines[1].suffer(fate)
            rollouts = await asyncio.wait_for(task, 60)
            while states(pool)[1] is not State.DEAD:
                await asyncio.sleep(0.05)
        num_asked = len(engines[1].requests)
        rest = await pool.generate_group(group(100, 8))
        assert len(engines[1].requests) == num_asked
        return rollouts + rest

    rollouts = asyncio.run(run())
    assert_exactly(rollouts, [*range(24), *range(100, 108)])
    assert "e1" not in {rollout.engine for rollout in rollouts}
    assert list(lost) == ["e1"] and "did not answer" in lost["e1"]


def assert_exactly(rollouts: Sequence[Rollout], seeds: Sequence[int]) -> None:
    """Check that each sample is the one that its seed gives: none is missing, double, swapped or invented."""

    async def alone() -> list[list[int]]:
        engine = FakeEngine("alone")
        return [(await engine.generate(request(seed))).token_ids.tolist() for seed in seeds]

    assert [rollout.token_ids.tolist() for rollout in rollouts] == asyncio.run(alone())


def test_an_engine_that_takes_work_and_never_writes_is_given_up_though_it_answers() -> None:
    lost: dict[str, str] = {}

    async def run() -> tuple[Rollout, ...]:
        hung = FakeEngine("hung", delay_s=lambda seed: 3600.0)
        pool = pool_of(
            [hung, FakeEngine("fine")],
            max_in_flight=4,
            stall_s=1.0,
            on_lost=lambda name, reason: bool(lost.__setitem__(name, reason)),
        )
        async with pool.watching():
            return await asyncio.wait_for(pool.generate_group(group(0, 12)), 60)

    assert_exactly(asyncio.run(run()), range(12))
    assert "samples to write and wrote nothing for" in lost["hung"]


def test_a_slow_engine_that_goes_on_writing_is_not_given_up() -> None:
    async def run() -> list[State]:
        slow = FakeEngine("slow", delay_s=lambda seed: 0.5 * (1 + seed))
        pool = pool_of([slow], max_in_flight=8, stall_s=2.0)
        async with pool.watching():
            await asyncio.wait_for(pool.generate_group(group(0, 7)), 60)
        return states(pool)

    assert asyncio.run(run()) == [State.READY]  # after 3.5 s, with a sample every 0.5 s


def test_the_end_of_a_process_is_noticed_before_any_time_out() -> None:
    ended: dict[str, str] = {}

    async def run() -> tuple[Rollout, ...]:
        engines = [Mortal(f"e{i}", delay_s=lambda seed: 0.05) for i in range(2)]
        pool = pool_of(engines, max_in_flight=8, stall_s=600.0, why_ended=ended.get)
        async with pool.watching():
            task = asyncio.create_task(pool.generate_group(group(0, 12)))
            await until(lambda: engines[0].running > 0)
            engines[0].suffer("frozen")
            ended["e0"] = "ended with status -9"
            return await asyncio.wait_for(task, 60)

    assert_exactly(asyncio.run(run()), range(12))


def test_with_no_engine_left_the_error_tells_what_became_of_each() -> None:
    async def run() -> None:
        engines = [Mortal(f"e{i}", delay_s=lambda seed: 0.05) for i in range(3)]
        reasons = {"e1": "ended with status -9: CUDA error (see e1.log)"}
        pool = pool_of(engines, max_in_flight=2, stall_s=0.2, why_ended=reasons.get)
        async with pool.watching():
            task = asyncio.create_task(pool.generate_group(group(0, 12)))
            await until(lambda: engines[0].running > 0)
            engines[0].suffer("frozen")
            engines[2].suffer("nonsense")
            with pytest.raises(EngineError) as failure:
                await asyncio.wait_for(task, 60)
        said = str(failure.value)
        assert said.startswith("no engine is left to write completions. e0: it did not answer for")
        assert "e1: ended with status -9: CUDA error (see e1.log)" in said and "not JSON" in said
        with pytest.raises(EngineError, match="no engine is left"):
            await asyncio.wait_for(pool.generate_group(group(50, 2)), 60)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_an_engine_that_fails_for_a_moment_serves_again() -> None:
    class Hiccup(FakeEngine):
        async def generate(self, request: RolloutRequest) -> Rollout:
            if len(self.requests) in (1, 2):  # two fail together
                self.requests.append(request)
                raise EngineFaultError("the connection broke")
            return await super().generate(request)

    async def run() -> tuple[tuple[Rollout, ...], list[State]]:
        pool = pool_of([Hiccup("only")], max_in_flight=4)
        async with pool.watching():
            return await asyncio.wait_for(pool.generate_group(group(0, 8)), 60), states(pool)

    rollouts, after = asyncio.run(run())
    assert_exactly(rollouts, range(8))
    assert after == [State.READY]


def test_a_sample_that_every_engine_fails_is_an_error_and_not_the_end_of_all_engines() -> None:
    async def run() -> list[State]:
        engines = [FakeEngine(f"e{i}", fails=lambda seed: seed == 5) for i in range(5)]
        pool = pool_of(engines, max_in_flight=4)
        async with pool.watching():
            with pytest.raises(EngineFaultError, match="was told to fail"):
                await asyncio.wait_for(pool.generate_group(group(0, 8)), 60)
        assert sum(req.seed == 5 for engine in engines for req in engine.requests) == 3
        return states(pool)

    assert State.DEAD not in asyncio.run(run())


def test_an_engine_that_fails_whatever_it_is_given_is_given_up_though_it_answers_when_asked() -> None:
    lost: dict[str, str] = {}

    async def run() -> None:
        engines = [FakeEngine("bad", fails=lambda seed: True), FakeEngine("good", delay_s=lambda seed: 0.05)]
        pool = pool_of(engines, max_in_flight=2, on_lost=lambda name, reason: bool(lost.__setitem__(name, reason)))
        async with pool.watching():
            while not lost:
                await asyncio.wait_for(pool.generate_group(group(0, 8)), 60)

    asyncio.run(run())
    assert "failed 3 times in a row" in lost["bad"]


def test_what_an_engine_has_written_counts_though_it_is_lost_in_the_same_moment() -> None:
    async def run() -> int:
        engines = [FakeEngine("e0", delay_s=lambda seed: 0.02), FakeEngine("e1", delay_s=lambda seed: 0.02)]
        pool = pool_of(engines, max_in_flight=8, margin=100)
        task = asyncio.create_task(pool.generate_group(group(0, 4)))
        while not any(t.attempt is not None and t.attempt.done() for t in pool._tickets.values()):
            await asyncio.sleep(0)
        pool.lost("e0", "told so")
        assert_later.append(await task)
        return len(engines[1].requests)

    assert_later: list[tuple[Rollout, ...]] = []
    num_again = asyncio.run(run())
    assert_exactly(assert_later[0], range(4))
    assert num_again < 4


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32), st.integers(2, 4), st.integers(1, 4))
def test_whatever_dies_whenever_every_sample_comes_once_while_one_engine_lives(
    seed: int, num_engines: int, max_in_flight: int
) -> None:
    chance = random.Random(seed)
    sizes = [chance.randint(1, 6) for _ in range(chance.randint(1, 5))]

    async def run() -> list[tuple[Rollout, ...]]:
        engines = [Mortal(f"e{i}", delay_s=lambda s: 0.001 * (s % 5)) for i in range(num_engines)]
        pool = pool_of(engines, max_in_flight=max_in_flight, stall_s=0.6)

        async def reap() -> None:
            for engine in engines[1:]:
                await asyncio.sleep(chance.random() * 0.01)
                engine.suffer(chance.choice(FATES))
                if engine.fate == "killed" and chance.random() < 0.5:
                    pool.lost(engine.name, "told so")

        async with pool.watching():
            reaper = asyncio.create_task(reap())
            groups = [pool.generate_group(group(100 * i, size)) for i, size in enumerate(sizes)]
            results = await asyncio.wait_for(asyncio.gather(*groups), 60)
            await reaper
        assert [load.running for load in pool.loads()] == [0] * num_engines
        assert not pool._tickets and len(asyncio.all_tasks()) == 1
        return list(results)

    for i, (size, rollouts) in enumerate(zip(sizes, asyncio.run(run()), strict=True)):
        assert_exactly(rollouts, range(100 * i, 100 * i + size))


class Streaming(FakeEngine):
    """Sends the first half of each completion as it writes, and then dies or freezes."""

    def __init__(self, name: str, fate: str) -> None:
        super().__init__(name)
        self._fate = fate
        self._sent: dict[str, Rollout] = {}

    def written(self, name: str) -> Rollout | None:
        return self._sent.get(name)

    async def report(self) -> EngineReport:
        if self._fate == "frozen":
            await asyncio.sleep(3600)
        return await super().report()

    async def generate(self, request: RolloutRequest) -> Rollout:
        whole = await super().generate(request)
        half = len(whole.token_ids) // 2
        part = replace(
            whole,
            token_ids=whole.token_ids[:half],
            rollout_logprobs=whole.rollout_logprobs[:half],
            finish_reason="cut",
        )
        self._sent[request.name] = part
        try:
            if self._fate == "killed":
                raise EngineFaultError("the connection broke", partial=part)
            await asyncio.sleep(3600)
            raise AssertionError
        finally:
            del self._sent[request.name]


@pytest.mark.parametrize("fate", ["killed", "frozen"])
def test_what_a_lost_engine_had_sent_is_kept_and_only_the_rest_is_written_again(fate: str) -> None:
    lost, other = Streaming("e0", fate), FakeEngine("e1")

    async def run() -> tuple[Rollout, ...]:
        pool = pool_of([lost, other], max_in_flight=8, margin=8, stall_s=1.0)
        async with pool.watching():
            return await asyncio.wait_for(pool.generate_group(group(0, 4)), 60)

    rollouts = asyncio.run(run())
    assert len(lost.requests) == len(other.requests) == 4
    rest_of = {again.seed: again for again in other.requests}
    for asked, rollout in zip(group(0, 4), rollouts, strict=True):
        whole = asyncio.run(FakeEngine("e0").generate(asked))
        half = len(whole.token_ids) // 2
        part = replace(whole, token_ids=whole.token_ids[:half], rollout_logprobs=whole.rollout_logprobs[:half])
        expected = go_on(asked, [part], name="x")
        again = rest_of[expected.seed]
        assert replace(again, name="x") == expected
        rest = asyncio.run(FakeEngine("e1").generate(again))
        assert rollout.token_ids.tolist() == [*part.token_ids.tolist(), *rest.token_ids.tolist()]
        assert rollout.rollout_logprobs.tolist() == [*part.rollout_logprobs.tolist(), *rest.rollout_logprobs.tolist()]
        assert (rollout.engine, rollout.finish_reason) == ("e1", rest.finish_reason)


def test_the_oldest_step_goes_first() -> None:
    engine = FakeEngine("e", delay_s=lambda seed: 0.005)
    pool = pool_of([engine], max_in_flight=1)

    async def run() -> None:
        new = asyncio.create_task(pool.generate_group(group(0, 3), step=8))
        await asyncio.sleep(0)
        old = asyncio.create_task(pool.generate_group(group(100, 3), step=7))
        await asyncio.gather(new, old)

    asyncio.run(run())
    assert [r.seed for r in engine.requests] == [0, 100, 101, 102, 1, 2]


def test_watching_costs_little_and_ends_with_its_context() -> None:
    class Counting(FakeEngine):
        num_reports = 0

        async def report(self) -> EngineReport:
            self.num_reports += 1
            return await super().report()

    engines = [Counting(f"e{i}") for i in range(3)]
    pool = pool_of(engines, poll_s=300.0)

    async def run() -> None:
        async with pool.watching():
            async with pool.watching():
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.02)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
    assert all(1 <= engine.num_reports <= 2 for engine in engines)


# ---- samples that go on elsewhere ----


class Filling(FakeEngine):
    """Says that its cache is as full as it is told to."""

    def __init__(self, name: str, kv_usage: float, *, delay_s: Callable[[int], float]) -> None:
        super().__init__(name, delay_s=delay_s)
        self.kv_usage = kv_usage
        self.num_cuts = 0
        self.cut_error: Exception | None = None

    async def report(self) -> EngineReport:
        return replace(await super().report(), kv_usage=self.kv_usage)

    async def cut(self, name: str) -> None:
        self.num_cuts += 1
        if self.cut_error is not None:
            raise self.cut_error
        await super().cut(name)


async def run_unevenly(full: Filling, empty: Filling, monkeypatch: pytest.MonkeyPatch) -> tuple[Rollout, ...]:
    """Have a full engine write four samples that would take long, beside an empty one that is quick."""
    monkeypatch.setattr("shoal.rollout.dispatch._LEAST_AGE_S", 0.05)
    pool = pool_of([full, empty], max_in_flight=8, margin=100)
    async with pool.watching():
        rollouts = await asyncio.wait_for(pool.generate_group(group(0, 4)), 60)
    assert [load.running for load in pool.loads()] == [0, 0]
    assert len(asyncio.all_tasks()) == 1
    return rollouts


def test_a_sample_of_a_full_engine_goes_on_in_an_empty_one_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Filling("full", 0.9, delay_s=lambda seed: 1.5)
    empty = Filling("empty", 0.1, delay_s=lambda seed: 0.0)
    rollouts = asyncio.run(run_unevenly(full, empty, monkeypatch))
    moved = [rollout for rollout in rollouts if rollout.engine == "empty"]
    assert moved and len(empty.requests) == len(moved) == full.num_cuts
    first = {req.seed: req for req in full.requests}
    for again in empty.requests:
        (begun,) = [req for req in first.values() if req.prompt_token_ids == again.prompt_token_ids[:2]]
        (rollout,) = [r for r, seed in zip(rollouts, range(4), strict=True) if seed == begun.seed]
        done = again.prompt_token_ids[2:]
        assert tuple(rollout.token_ids[: len(done)]) == done
        assert again.sampling.max_tokens == SAMPLING.max_tokens - len(done)
        assert rollout.finish_reason in ("stop", "length") and len(rollout.token_ids) == len(rollout.rollout_logprobs)
    assert len({req.name for engine in (full, empty) for req in engine.requests}) == 4 + len(moved)


def test_an_engine_that_hands_nothing_over_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Filling("full", 0.9, delay_s=lambda seed: 1.0)
    full.cut_error = EngineRequestError("answered /abort_requests with status 404")
    rollouts = asyncio.run(run_unevenly(full, Filling("empty", 0.1, delay_s=lambda seed: 0.0), monkeypatch))
    assert_exactly(rollouts, range(4))
    assert full.num_cuts == 1


def test_even_engines_keep_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Filling("full", 0.9, delay_s=lambda seed: 1.0)
    rollouts = asyncio.run(run_unevenly(full, Filling("other", 0.9, delay_s=lambda seed: 0.0), monkeypatch))
    assert full.num_cuts == 0
    assert_exactly(rollouts, range(4))


# ---- engines that come back ----


def test_an_engine_that_comes_back_writes_only_once_it_is_proven_and_others_write_meanwhile() -> None:
    slow = FakeEngine("slow", delay_s=lambda seed: 60.0)
    fast, following = FakeEngine("fast", delay_s=lambda seed: 0.01), FakeEngine("slow")

    async def run() -> None:
        pool = pool_of([slow, fast], max_in_flight=2, on_lost=lambda name, reason: True)
        task = asyncio.create_task(pool.generate_group(group(0, 8)))
        await asyncio.sleep(0)
        await until(lambda: slow.running > 0)
        pool.lost("slow", "it was killed")
        assert pool.loads()[0].state is State.STARTING
        assert {rollout.engine for rollout in await task} == {"fast"}
        assert pool.counts().engines_lost == 1 and pool.counts().samples_reissued == 2
        pool.proven(0, ["slow"])  # late news of the former process
        assert pool.loads()[0].state is State.STARTING
        pool.started("slow", following)
        assert pool.loads()[0].state is State.STALE
        await pool.generate_group(group(100, 8))
        assert following.requests == []
        pool.proven(0, ["slow"])
        await pool.generate_group(group(200, 8))
        assert len(following.requests) > 0

    asyncio.run(run())


def test_with_no_other_engine_samples_wait_for_the_one_that_is_on_its_way() -> None:
    async def run() -> None:
        pool = pool_of([FakeEngine("a", delay_s=lambda seed: 60.0)], on_lost=lambda name, reason: True)
        task = asyncio.create_task(pool.generate_group(group(0, 3)))
        await asyncio.sleep(0.01)
        pool.lost("a", "it was killed")
        await asyncio.sleep(0.05)
        assert not task.done() and pool.why_hopeless() is None
        pool.started("a", following := FakeEngine("a"))
        pool.proven(0, ["a"])
        assert len(await task) == len(following.requests) == 3

    asyncio.run(run())


def test_when_the_last_one_on_its_way_is_given_up_what_waits_fails_with_every_reason() -> None:
    async def run() -> None:
        engines = [FakeEngine(name, delay_s=lambda seed: 60.0) for name in ("a", "b")]
        pool = pool_of(engines, on_lost=lambda name, reason: name == "a")
        task = asyncio.create_task(pool.generate_group(group(0, 3)))
        await asyncio.sleep(0.01)
        pool.lost("a", "it was killed")
        pool.lost("b", "it stalled")
        await asyncio.sleep(0.05)
        assert not task.done()
        pool.given_up("a", "it does not start")
        with pytest.raises(NoEngineError, match=r"no engine is left.*a: it does not start; b: it stalled"):
            await task

    asyncio.run(run())


def test_an_engine_on_its_way_is_not_watched_and_cannot_be_lost_twice() -> None:
    lost: list[str] = []

    async def run() -> None:
        asked = []
        pool = pool_of(
            [FakeEngine("a"), FakeEngine("b")],
            on_lost=lambda name, reason: bool(lost.append(name)) or True,
            why_ended=lambda name: asked.append(name),
        )
        pool.lost("a", "it was killed")
        pool.lost("a", "it was killed, as somebody else says")
        async with pool.watching():
            await until(lambda: asked.count("b") > 2)
        assert lost == ["a"] and "a" not in asked

    asyncio.run(run())


@pytest.mark.parametrize("num_turns", range(6))
def test_the_watch_ends_when_it_is_told_to_in_the_moment_of_an_answer(num_turns: int) -> None:
    """`asyncio.wait_for` of Python 3.11 forgets a cancellation that comes after the answer and before its news."""

    class Asked(FakeEngine):
        answer: asyncio.Future[None] | None = None

        async def report(self) -> EngineReport:
            self.answer = asyncio.get_running_loop().create_future()
            await self.answer
            return await super().report()

    async def run() -> None:
        engine = Asked("a")
        pool = pool_of([engine])
        async with asyncio.timeout(60):
            async with pool.watching():
                await until(lambda: engine.answer is not None)
                assert engine.answer is not None
                engine.answer.set_result(None)
                for _ in range(num_turns):
                    await asyncio.sleep(0)

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)
