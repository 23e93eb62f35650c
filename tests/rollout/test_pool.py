"""Several engines as one: together while no worse, bounded, cancelled as a whole, counted."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import EngineRequestError
from shoal.rollout.pool import EnginePool
from shoal.testing import FakeEngine
from shoal.types import Rollout, RolloutRequest, SamplingSettings

SAMPLING = SamplingSettings(temperature=1.0, max_tokens=12, stop_token_ids=(2,))


def request(seed: int) -> RolloutRequest:
    return RolloutRequest(prompt_token_ids=(5, seed), seed=seed, sampling=SAMPLING)


def group(first_seed: int, size: int) -> list[RolloutRequest]:
    return [request(first_seed + sample) for sample in range(size)]


def pool_of(engines: list[FakeEngine], *, max_in_flight: int = 8, margin: int = 2) -> EnginePool:
    return EnginePool(engines, max_in_flight=max_in_flight, affinity_margin=margin)


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


def test_a_sample_that_fails_cancels_the_rest_of_its_group_and_raises_its_error() -> None:
    engines = [
        FakeEngine(f"e{i}", delay_s=lambda seed: 0.01 if seed == 3 else 5.0, fails=lambda seed: seed == 3)
        for i in range(2)
    ]
    pool = pool_of(engines, max_in_flight=3)

    async def run() -> None:
        with pytest.raises(EngineRequestError, match=r"e[01] was told to fail"):
            await asyncio.wait_for(pool.generate_group(group(0, 20)), timeout=2)
        assert [engine.running for engine in engines] == [0, 0]
        assert [load.running for load in pool.loads()] == [0, 0]
        assert sum(len(engine.requests) for engine in engines) <= 7  # those that waited were never sent
        assert len(asyncio.all_tasks()) == 1  # nothing is left behind

    asyncio.run(run())
    assert sum(load.done_samples for load in pool.loads()) == 0


def test_one_groups_failure_leaves_another_group_alone() -> None:
    engine = FakeEngine("e", delay_s=lambda seed: 0.02, fails=lambda seed: seed == 0)
    pool = pool_of([engine], max_in_flight=3)

    async def run() -> tuple[tuple[Rollout, ...] | BaseException, ...]:
        return await asyncio.gather(
            pool.generate_group(group(0, 3)), pool.generate_group(group(50, 5)), return_exceptions=True
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
        return len(await asyncio.wait_for(pool.generate_group(group(50, 6)), timeout=2))

    assert asyncio.run(run()) == 6


def test_seeds_reach_the_engines_once_each() -> None:
    engines = [FakeEngine(f"e{i}") for i in range(3)]
    asyncio.run(pool_of(engines, margin=0).generate_group(group(10, 9)))
    assert Counter(r.seed for engine in engines for r in engine.requests) == Counter(range(10, 19))
