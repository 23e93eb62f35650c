"""Collect a step's groups: a group is rewarded the moment its last sample ends, while others still generate."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from shoal.rollout.pool import EnginePool
from shoal.rollout.tasks import gather_or_cancel
from shoal.types import CompletionLike, Prompt, Rollout, RolloutRequest, SamplingSettings, ScoredGroup

Decode = Callable[[Prompt, Sequence[Rollout]], tuple[CompletionLike, ...]]
"""Turns the completions of a prompt into what reward functions see."""

Score = Callable[[Prompt, tuple[Rollout, ...], tuple[CompletionLike, ...]], Awaitable[ScoredGroup]]
"""Rewards one finished group."""

Seed = Callable[[Prompt, int], int]
"""Seed of the n-th sample of a prompt."""


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
    """

    def __init__(self, pool: EnginePool, *, decode: Decode, score: Score) -> None:
        self._pool = pool
        self._decode = decode
        self._score = score

    async def collect(self, request: GroupRequest) -> tuple[ScoredGroup, ...]:
        """Return one scored group for each prompt, in the order of the prompts whatever finished first.

        Raises:
            EngineError: No engine is left, or a request cannot be answered.
            RewardError: A reward function failed. In both cases everything under way is cancelled.
        """
        async with self._pool.watching():
            return await gather_or_cancel(self._collect_group(prompt, request) for prompt in request.prompts)

    async def _collect_group(self, prompt: Prompt, request: GroupRequest) -> ScoredGroup:
        rollouts = await self._pool.generate_group(
            [
                RolloutRequest(
                    prompt_token_ids=prompt.token_ids,
                    seed=request.seed(prompt, sample),
                    sampling=request.sampling_of(prompt, sample),
                )
                for sample in range(request.num_generations)
            ],
            step=request.step,
        )
        return await self._score(prompt, rollouts, self._decode(prompt, rollouts))
