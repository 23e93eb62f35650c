"""Collect a step's groups: a group is rewarded the moment its last sample ends, while others still generate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from shoal.protocols import RolloutFlow
from shoal.rollout.conversation import SampleConversation, SingleTurn
from shoal.rollout.pool import EnginePool
from shoal.rollout.tasks import gather_or_cancel
from shoal.types import CompletionLike, Prompt, Rollout, RolloutRequest, SamplingSettings, ScoredGroup

Decode = Callable[[Prompt, Sequence[Rollout]], tuple[CompletionLike, ...]]
"""Turns the completions of a prompt into what reward functions see."""

Score = Callable[[Prompt, tuple[Rollout, ...], tuple[CompletionLike, ...]], Awaitable[ScoredGroup]]
"""Rewards one finished group."""

Seed = Callable[[Prompt, int], int]
"""Seed of the n-th sample of a prompt."""


@dataclass(frozen=True, slots=True)
class FinishedGroup:
    """A scored group, and which of the requested prompts it is of."""

    place: int
    group: ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """What to collect.

    Attributes:
        prompts: P prompts.
        num_generations: K samples for each.
        sampling: How to sample.
        seed: Seed of each sample.
        step: The optimizer step that it is for; samples of an older one go first.
        max_tokens: Of the n-th sample of a prompt, where they differ; None for that of `sampling`.
    """

    prompts: tuple[Prompt, ...]
    num_generations: int
    sampling: SamplingSettings
    seed: Seed
    step: int = 0
    max_tokens: Callable[[Prompt, int], int] | None = None

    def sampling_of(self, prompt: Prompt, sample: int) -> SamplingSettings:
        """Return how one sample is to be taken."""
        if self.max_tokens is None:
            return self.sampling
        return replace(self.sampling, max_tokens=self.max_tokens(prompt, sample))


class RolloutCollector:
    """Asks the pool for groups and has them rewarded as they finish.

    Args:
        pool: Writes completions.
        decode: Makes them readable.
        score: Rewards them.
        flow: How a sample comes about; None for one turn.
    """

    def __init__(self, pool: EnginePool, *, decode: Decode, score: Score, flow: RolloutFlow | None = None) -> None:
        self._pool = pool
        self._decode = decode
        self._score = score
        self._flow = flow or SingleTurn()

    async def collect(self, request: GroupRequest) -> tuple[ScoredGroup, ...]:
        """Return one scored group for each prompt, in the order of the prompts whatever finished first.

        Raises:
            EngineError: No engine is left, or a request cannot be answered.
            RewardError: A reward function failed.
            RolloutFlowError: The flow did what it must not. In all cases everything under way is cancelled.
        """
        groups: dict[int, ScoredGroup] = {}
        async with aclosing(self.stream(request)) as stream:
            async for finished in stream:
                groups[finished.place] = finished.group
        return tuple(groups[place] for place in range(len(request.prompts)))

    async def stream(self, request: GroupRequest) -> AsyncGenerator[FinishedGroup, None]:
        """Yield one scored group for each prompt, each the moment it is scored.

        Close it (`contextlib.aclosing`) where it may not be read to its end: that cancels what is under way.

        Raises:
            EngineError, RewardError, RolloutFlowError: As for `collect`.
        """
        finished: asyncio.Queue[asyncio.Task[ScoredGroup]] = asyncio.Queue()
        async with self._pool.watching():
            tasks = [asyncio.create_task(self._collect_group(prompt, request)) for prompt in request.prompts]
            places = {task: place for place, task in enumerate(tasks)}
            for task in tasks:
                task.add_done_callback(finished.put_nowait)
            try:
                for _ in tasks:
                    task = await finished.get()
                    yield FinishedGroup(places[task], task.result())
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _collect_group(self, prompt: Prompt, request: GroupRequest) -> ScoredGroup:
        group = self._pool.new_group()
        rollouts = await gather_or_cancel(
            self._write_sample(prompt, request, sample, group) for sample in range(request.num_generations)
        )
        return await self._score(prompt, rollouts, self._decode(prompt, rollouts))

    async def _write_sample(self, prompt: Prompt, request: GroupRequest, sample: int, group: int) -> Rollout:
        async def write(turn: RolloutRequest, near: str | None) -> Rollout:
            """Keep first turns with those of the prompt's other samples, and later ones with what they follow on."""
            (rollout,) = await self._pool.generate_group(
                [turn], step=request.step, group=group if near is None else None, near=near
            )
            return rollout

        asked = RolloutRequest(
            prompt_token_ids=prompt.token_ids,
            seed=request.seed(prompt, sample),
            sampling=request.sampling_of(prompt, sample),
        )
        conversation = SampleConversation(prompt, asked, write)
        await self._flow.run(conversation)
        return conversation.rollout()
