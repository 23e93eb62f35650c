"""Groups are rewarded as they finish, and handed back in the order of their prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal.errors import EngineRequestError, RewardError
from shoal.rollout.collector import GroupRequest, RolloutCollector
from shoal.rollout.dispatch import DispatchSettings
from shoal.rollout.pool import EnginePool, PoolSettings
from shoal.testing import FakeEngine
from shoal.types import CompletionLike, Prompt, Rollout, RolloutRequest, SamplingSettings, ScoredGroup

SAMPLING = SamplingSettings(temperature=0.7, max_tokens=9, stop_token_ids=(2,))


def prompts(count: int) -> tuple[Prompt, ...]:
    return tuple(
        Prompt(row=row, prompt=f"prompt {row}", token_ids=(7, row), columns={"answer": row}) for row in range(count)
    )


def seed_of(prompt: Prompt, sample: int) -> int:
    return 1000 * prompt.row + sample


def group_request(num_prompts: int, num_generations: int) -> GroupRequest:
    return GroupRequest(prompts=prompts(num_prompts), num_generations=num_generations, sampling=SAMPLING, seed=seed_of)


def decode(prompt: Prompt, rollouts: Sequence[Rollout]) -> tuple[CompletionLike, ...]:
    return tuple(f"{prompt.prompt}: {rollout.token_ids.tolist()}" for rollout in rollouts)


def scored(prompt: Prompt, rollouts: tuple[Rollout, ...], completions: tuple[CompletionLike, ...]) -> ScoredGroup:
    rewards = np.array([[float(prompt.row)] for _ in rollouts])
    return ScoredGroup(prompt=prompt, rollouts=rollouts, completions=completions, rewards=rewards, extras={})


async def score(prompt: Prompt, rollouts: tuple[Rollout, ...], completions: tuple[CompletionLike, ...]) -> ScoredGroup:
    return scored(prompt, rollouts, completions)


def collector(engines: list[Any], score: Any = score, max_in_flight: int = 100) -> RolloutCollector:
    dispatch = DispatchSettings(max_in_flight=max_in_flight, affinity_margin=2)
    pool = EnginePool(engines, PoolSettings(dispatch=dispatch, stall_s=30.0))
    pool.publishing(0)
    pool.proven(0, [engine.name for engine in engines])
    return RolloutCollector(pool, decode=decode, score=score)


def test_groups_come_back_in_the_order_of_their_prompts_whatever_finishes_first() -> None:
    finished: list[int] = []

    async def noting(prompt: Prompt, rollouts: tuple[Rollout, ...], texts: tuple[CompletionLike, ...]) -> ScoredGroup:
        finished.append(prompt.row)
        return scored(prompt, rollouts, texts)

    engine = FakeEngine("e", delay_s=lambda seed: 0.12 - 0.02 * (seed // 1000))
    groups = asyncio.run(collector([engine], noting).collect(group_request(6, 3)))
    assert finished == [5, 4, 3, 2, 1, 0]  # the control: they did finish in another order
    assert [group.prompt.row for group in groups] == [0, 1, 2, 3, 4, 5]


def test_samples_may_each_have_their_own_length() -> None:
    engine = FakeEngine("e")
    request = replace(group_request(2, 3), max_tokens=lambda prompt, sample: 10 * prompt.row + sample + 1)
    asyncio.run(collector([engine]).collect(request))
    asked = {request.seed: request.sampling for request in engine.requests}
    assert asked == {
        seed_of(p, k): replace(SAMPLING, max_tokens=10 * p.row + k + 1) for p in prompts(2) for k in range(3)
    }


def test_a_group_holds_its_own_samples_with_their_own_seeds_and_texts() -> None:
    engine = FakeEngine("e", delay_s=lambda seed: 0.001 * (seed % 7))
    groups = asyncio.run(collector([engine]).collect(group_request(4, 3)))
    sent = {request.seed: request for request in engine.requests}
    assert sorted(sent) == sorted(seed_of(p, k) for p in prompts(4) for k in range(3))

    async def alone(seed: int) -> list[int]:
        return [int(token) for token in (await FakeEngine("alone").generate(sent[seed])).token_ids]

    for group in groups:
        assert [r.token_ids.tolist() for r in group.rollouts] == [
            asyncio.run(alone(seed_of(group.prompt, sample))) for sample in range(3)
        ]
        assert group.completions == decode(group.prompt, group.rollouts)
        assert all(sent[seed_of(group.prompt, k)].prompt_token_ids == group.prompt.token_ids for k in range(3))
        assert all(sent[seed_of(group.prompt, k)].sampling == SAMPLING for k in range(3))


def test_a_finished_group_is_rewarded_while_another_still_generates() -> None:
    rewarded = asyncio.Event()

    class WaitsForTheReward(FakeEngine):
        """Its last group does not end before the first one's reward has begun: else this test would time out."""

        async def generate(self, request: RolloutRequest) -> Rollout:
            if request.seed >= 1000:
                await asyncio.wait_for(rewarded.wait(), timeout=60)
            return await super().generate(request)

    async def noting(prompt: Prompt, rollouts: tuple[Rollout, ...], texts: tuple[CompletionLike, ...]) -> ScoredGroup:
        if prompt.row == 0:
            rewarded.set()
        return scored(prompt, rollouts, texts)

    groups = asyncio.run(collector([WaitsForTheReward("e")], noting).collect(group_request(2, 2)))
    assert [group.prompt.row for group in groups] == [0, 1]


def test_rewards_of_several_groups_run_side_by_side() -> None:
    under_way = 0
    most = 0

    async def slow(prompt: Prompt, rollouts: tuple[Rollout, ...], texts: tuple[CompletionLike, ...]) -> ScoredGroup:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.05)
        under_way -= 1
        return scored(prompt, rollouts, texts)

    asyncio.run(collector([FakeEngine("e")], slow).collect(group_request(4, 2)))
    assert most == 4


def test_a_reward_that_fails_cancels_generation_and_its_error_is_raised() -> None:
    engine = FakeEngine("e", delay_s=lambda seed: 0.01 if seed < 1000 else 300.0)

    async def failing(prompt: Prompt, rollouts: tuple[Rollout, ...], texts: tuple[CompletionLike, ...]) -> ScoredGroup:
        raise RewardError("reward function length_reward raised ValueError")

    async def run() -> None:
        with pytest.raises(RewardError, match="length_reward"):
            await asyncio.wait_for(collector([engine], failing, 8).collect(group_request(6, 4)), timeout=60)
        assert engine.running == 0
        assert len(engine.requests) < 24  # what waited was never sent
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_a_request_that_is_refused_cancels_the_other_groups_and_their_rewards() -> None:
    cancelled: list[int] = []

    class Refusing(FakeEngine):
        async def generate(self, request: RolloutRequest) -> Rollout:
            rollout = await super().generate(request)
            if request.seed >= 1000:
                raise EngineRequestError("e refuses")
            return rollout

    engine = Refusing("e", delay_s=lambda seed: 0.05 if seed >= 1000 else 0.0)

    async def endless(prompt: Prompt, rollouts: tuple[Rollout, ...], texts: tuple[CompletionLike, ...]) -> ScoredGroup:
        try:
            await asyncio.sleep(300)
        except asyncio.CancelledError:
            cancelled.append(prompt.row)
            raise
        return scored(prompt, rollouts, texts)

    async def run() -> None:
        with pytest.raises(EngineRequestError, match="e refuses"):
            await asyncio.wait_for(collector([engine], endless).collect(group_request(2, 2)), timeout=60)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
    assert cancelled == [0]


def test_cancelling_the_collection_cancels_everything_in_it() -> None:
    engine = FakeEngine("e", delay_s=lambda seed: 300.0)

    async def run() -> None:
        task = asyncio.create_task(collector([engine]).collect(group_request(3, 3)))
        async with asyncio.timeout(60):  # of the 300 s that each takes
            while engine.running < 9:
                await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.running == 0
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_no_prompts_give_no_groups() -> None:
    assert asyncio.run(collector([FakeEngine("e")]).collect(group_request(0, 3))) == ()


def test_a_group_is_handed_on_the_moment_it_is_scored() -> None:
    taken = asyncio.Event()

    class WaitsForTheFirst(FakeEngine):
        """Its second prompt does not end before the first one's group was taken: else this test would time out."""

        async def generate(self, request: RolloutRequest) -> Rollout:
            if request.seed >= 1000:
                await asyncio.wait_for(taken.wait(), timeout=60)
            return await super().generate(request)

    async def run() -> list[tuple[int, int]]:
        found = []
        async for finished in collector([WaitsForTheFirst("e")]).stream(group_request(2, 2)):
            found.append((finished.place, finished.group.prompt.row))
            taken.set()
        return found

    assert asyncio.run(run()) == [(0, 0), (1, 1)]


def test_who_stops_reading_ends_what_is_under_way() -> None:
    engine = FakeEngine("e", delay_s=lambda seed: 0.0 if seed < 1000 else 30.0)

    async def run() -> None:
        async with aclosing(collector([engine]).stream(group_request(3, 2))) as stream:
            async for finished in stream:
                assert finished.place == 0 and engine.running == 4
                break
        assert engine.running == 0
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
