"""Conversations: each turn goes on where the last one was written, after exactly its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import EngineFaultError, RolloutFlowError
from shoal.protocols import Conversation, RolloutFlow
from shoal.rollout.collector import GroupRequest, RolloutCollector
from shoal.rollout.conversation import SampleConversation, SingleTurn
from shoal.rollout.dispatch import DispatchSettings
from shoal.rollout.pool import EnginePool, PoolSettings
from shoal.testing import FakeEngine
from shoal.types import CompletionLike, Prompt, Rollout, RolloutRequest, SamplingSettings, ScoredGroup

MAX_TOKENS = 40
SAMPLING = SamplingSettings(temperature=1.0, max_tokens=MAX_TOKENS, stop_token_ids=(2,))
TOOL = (900, 901, 902)


class ShortTurns(FakeEngine):
    """Writes at most four tokens at a time, so that there is room for more turns."""

    async def generate(self, request: RolloutRequest) -> Rollout:
        rollout = await super().generate(request)
        return Rollout(
            token_ids=rollout.token_ids[:4],
            rollout_logprobs=rollout.rollout_logprobs[:4],
            finish_reason="stop",
            weight_version=rollout.weight_version,
            engine=rollout.engine,
        )


class Turns:
    """Asks the policy several times, with a tool's answer before each further turn."""

    def __init__(self, num_turns: int) -> None:
        self._num_turns = num_turns

    async def run(self, conversation: Conversation) -> None:
        await conversation.ask()
        for _ in range(self._num_turns - 1):
            conversation.add(TOOL)
            await conversation.ask()


def pool_of(engines: Sequence[Any], *, margin: int = 100, **keywords: Any) -> EnginePool:
    dispatch = DispatchSettings(max_in_flight=100, affinity_margin=margin)
    pool = EnginePool(engines, PoolSettings(dispatch=dispatch, stall_s=30.0, poll_s=0.05), **keywords)
    pool.publishing(0)
    pool.proven(0, [engine.name for engine in engines])
    return pool


def collect(pool: EnginePool, flow: RolloutFlow | None, *, num_prompts: int, num_generations: int) -> list[Rollout]:
    async def score(
        prompt: Prompt, rollouts: tuple[Rollout, ...], completions: tuple[CompletionLike, ...]
    ) -> ScoredGroup:
        rewards = np.zeros((len(rollouts), 1))
        return ScoredGroup(prompt=prompt, rollouts=rollouts, completions=completions, rewards=rewards, extras={})

    request = GroupRequest(
        prompts=tuple(Prompt(row=row, prompt="p", token_ids=(7, row), columns={}) for row in range(num_prompts)),
        num_generations=num_generations,
        sampling=SAMPLING,
        seed=lambda prompt, sample: 1000 * prompt.row + sample,
    )
    collector = RolloutCollector(pool, decode=lambda prompt, rollouts: ("c",) * len(rollouts), score=score, flow=flow)
    groups = asyncio.run(asyncio.wait_for(collector.collect(request), timeout=20))
    return [rollout for group in groups for rollout in group.rollouts]


def requests_of(engines: Sequence[FakeEngine], first_seed: int) -> list[tuple[FakeEngine, RolloutRequest]]:
    """All turns of one sample in order, with who wrote them: each one's prompt begins with the one before."""
    sent = [(engine, request) for engine in engines for request in engine.requests]
    turns = [(engine, request) for engine, request in sent if request.seed == first_seed]
    while True:
        begin = turns[-1][1].prompt_token_ids
        later = [
            (engine, request)
            for engine, request in sent
            if len(request.prompt_token_ids) > len(begin)
            and request.prompt_token_ids[: len(begin)] == begin
            and (request.seed - first_seed) % 1_000_003 == 0
        ]
        if not later:
            return turns
        turns.append(min(later, key=lambda entry: len(entry[1].prompt_token_ids)))


def test_each_turn_follows_on_exactly_what_came_before_on_the_same_engine() -> None:
    engines = [ShortTurns(f"e{i}", delay_s=lambda seed: 0.001 * (seed % 5)) for i in range(3)]
    rollouts = collect(pool_of(engines), Turns(3), num_prompts=4, num_generations=3)
    assert len({rollout.engine for rollout in rollouts}) == 3
    for index, rollout in enumerate(rollouts):
        prompt, sample = divmod(index, 3)
        turns = requests_of(engines, 1000 * prompt + sample)
        assert len(turns) == 3 and {engine.name for engine, _ in turns} == {rollout.engine}
        written = [asyncio.run(ShortTurns("alone").generate(request)) for _, request in turns]
        tokens: list[int] = []
        for number, (turn, (_, request)) in enumerate(zip(written, turns, strict=True)):
            tokens += TOOL if number else ()
            assert request.prompt_token_ids == (7, prompt, *tokens)
            assert request.sampling.max_tokens == MAX_TOKENS - len(tokens)
            tokens += turn.token_ids.tolist()
        assert rollout.token_ids.tolist() == tokens
        assert rollout.by_policy is not None
        assert rollout.token_ids[~rollout.by_policy].tolist() == [*TOOL, *TOOL]
        assert rollout.rollout_logprobs[rollout.by_policy].tolist() == [
            logprob for turn in written for logprob in turn.rollout_logprobs.tolist()
        ]
        assert len({request.seed for _, request in turns}) == 3  # a generator that began anew would repeat its draws


def test_a_turn_stays_where_the_last_was_written_though_another_engine_is_idle() -> None:
    engines = [FakeEngine("e0", delay_s=lambda seed: 0.5 if seed >= 100 else 0.0), FakeEngine("e1")]

    async def run(near: str | None, margin: int) -> str:
        pool = pool_of(engines, margin=margin)
        pool.publishing(1)
        pool.proven(1, ["e0"])
        busy = asyncio.create_task(pool.generate_group([_request(100), _request(101)]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        pool.proven(1, ["e1"])
        (rollout,) = await pool.generate_group([_request(1)], near=near)
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)
        return rollout.engine

    assert asyncio.run(run("e0", margin=2)) == "e0"
    assert asyncio.run(run(None, margin=2)) == "e1"  # the control: the idle one is the least loaded
    assert asyncio.run(run("e0", margin=0)) == "e1"  # the bound: a prefix is not worth waiting for


def _request(seed: int) -> RolloutRequest:
    return RolloutRequest(prompt_token_ids=(5, seed), seed=seed, sampling=SAMPLING)


def test_a_turn_whose_engine_died_is_written_elsewhere_after_the_same_tokens() -> None:
    class DiesAtTheSecondTurn(ShortTurns):
        async def generate(self, request: RolloutRequest) -> Rollout:
            if TOOL[0] in request.prompt_token_ids and self.name == "e0":
                self.requests.append(request)
                raise EngineFaultError("e0 is gone")
            return await super().generate(request)

    engines = [DiesAtTheSecondTurn(f"e{i}") for i in range(2)]
    dead: list[str] = []
    pool = pool_of(
        engines,
        why_ended=lambda name: "killed" if name == "e0" and engines[0].requests else None,
        on_lost=lambda name, reason: dead.append(name),
    )
    (rollout,) = collect(pool, Turns(2), num_prompts=1, num_generations=1)
    failed, second = engines[0].requests[-1], engines[1].requests[-1]
    assert second.prompt_token_ids == failed.prompt_token_ids and second.prompt_token_ids[-3:] == TOOL
    assert (7, 0, *rollout.token_ids.tolist())[: len(second.prompt_token_ids)] == second.prompt_token_ids
    assert dead == ["e0"] and rollout.engine == "e1"


@pytest.mark.parametrize("num_engines", [1, 3])
@pytest.mark.parametrize("max_in_flight", [2, 100])
def test_the_plain_flow_asks_for_what_a_group_at_once_asks_for(num_engines: int, max_in_flight: int) -> None:
    def wheres(run: Callable[[EnginePool], object]) -> list[list[tuple[int, tuple[int, ...]]]]:
        engines = [FakeEngine(f"e{i}") for i in range(num_engines)]
        dispatch = DispatchSettings(max_in_flight=max_in_flight, affinity_margin=1)
        pool = EnginePool(engines, PoolSettings(dispatch=dispatch, stall_s=30.0))
        pool.publishing(0)
        pool.proven(0, [engine.name for engine in engines])
        run(pool)
        return [[(request.seed, request.prompt_token_ids) for request in engine.requests] for engine in engines]

    def at_once(pool: EnginePool) -> None:
        async def groups() -> None:
            await asyncio.gather(
                *(
                    pool.generate_group(
                        [
                            RolloutRequest(prompt_token_ids=(7, row), seed=1000 * row + sample, sampling=SAMPLING)
                            for sample in range(4)
                        ]
                    )
                    for row in range(5)
                )
            )

        asyncio.run(groups())

    by_flow = wheres(lambda pool: collect(pool, None, num_prompts=5, num_generations=4))
    assert by_flow == wheres(at_once)
    assert sum(map(len, by_flow)) == 20


def test_a_single_turn_is_the_engines_own_rollout_with_nothing_to_mask() -> None:
    (rollout,) = collect(pool_of([FakeEngine("e")]), SingleTurn(), num_prompts=1, num_generations=1)
    assert rollout.by_policy is None
    alone = RolloutRequest(prompt_token_ids=(7, 0), seed=0, sampling=SAMPLING)
    expected = asyncio.run(FakeEngine("e").generate(alone))
    assert rollout.token_ids.tolist() == expected.token_ids.tolist()


# ---- one conversation ----


def conversation(max_tokens: int = 10, *, turn: int = 3) -> SampleConversation:
    """Turns of `turn` tokens counting up from 10, or as many as there is room for."""

    async def write(request: RolloutRequest, near: str | None) -> Rollout:
        size = min(turn, request.sampling.max_tokens)
        return Rollout(
            token_ids=np.arange(10, 10 + size, dtype=np.int32),
            rollout_logprobs=np.full(size, -0.5, dtype=np.float32),
            finish_reason="stop" if size == turn else "length",
            weight_version=len(request.prompt_token_ids),
            engine="e",
        )

    sampling = SamplingSettings(temperature=1.0, max_tokens=max_tokens, stop_token_ids=())
    prompt = Prompt(row=3, prompt="p", token_ids=(1,), columns={})
    return SampleConversation(prompt, RolloutRequest(prompt_token_ids=(1,), seed=0, sampling=sampling), write)


@given(st.lists(st.integers(0, 6), max_size=8), st.integers(1, 5))
@settings(deadline=None)
def test_the_tokens_are_what_was_written_and_added_in_order_and_never_too_many(adds: list[int], turn: int) -> None:
    talk = conversation(24, turn=turn)
    expected: list[tuple[int, bool, float]] = []

    async def run() -> None:
        for number, size in enumerate([0, *adds]):
            if size > talk.room:
                with pytest.raises(RolloutFlowError, match="has room for"):
                    talk.add(range(100, 100 + size))
                continue
            if number:
                talk.add(range(100, 100 + size))
                expected.extend((token, False, 0.0) for token in range(100, 100 + size))
            if talk.room:
                written = await talk.ask()
                expected.extend((token, True, -0.5) for token in written.token_ids.tolist())

    asyncio.run(run())
    rollout = talk.rollout()
    by_policy = np.ones(len(rollout.token_ids), bool) if rollout.by_policy is None else rollout.by_policy
    found = zip(rollout.token_ids.tolist(), by_policy.tolist(), rollout.rollout_logprobs.tolist(), strict=True)
    assert list(found) == expected and len(expected) <= 24
    assert talk.token_ids == tuple(token for token, _, _ in expected)
    assert rollout.weight_version == 1  # of the oldest turn


def test_a_conversation_ends_as_its_last_turn_did_or_for_want_of_room() -> None:
    async def run(*steps: int) -> str:
        talk = conversation(10)
        for step in steps:
            if step:
                talk.add(range(step))
            else:
                await talk.ask()
        return talk.rollout().finish_reason

    assert asyncio.run(run(0)) == "stop"
    assert asyncio.run(run(0, 2, 0)) == "stop"
    assert asyncio.run(run(0, 2)) == "stop"
    assert asyncio.run(run(0, 7)) == "length"
    assert asyncio.run(run(0, 5, 0)) == "length"


def test_a_flow_that_asks_without_room_or_never_is_told_so() -> None:
    async def too_often() -> None:
        talk = conversation(3)
        await talk.ask()
        await talk.ask()

    with pytest.raises(RolloutFlowError, match=r"row 3 has all of its 3 tokens"):
        asyncio.run(too_often())
    with pytest.raises(RolloutFlowError, match="without asking the policy"):
        conversation().rollout()


def test_what_is_used_is_what_the_protocols_say() -> None:
    assert isinstance(SingleTurn(), RolloutFlow)
    assert not isinstance(object(), RolloutFlow)
