"""Everything between a completion and its advantage: call the reward functions, compare, and say what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoal.config import GRPOConfig
from shoal.rewards import RewardCaller, check_rewards, normalise_reward_funcs
from shoal.rollout.loop_thread import LoopThread
from shoal.trainer.checks import check_reward_weights
from shoal.trainer.groups import JudgedStep, group_metrics, judge, merge_logged
from shoal.types import CompletionLike, Prompt, Rollout, ScoredGroup

_CHECK_GRACE_S = 10.0


class Judge:
    """A run's reward functions with their weights.

    Args:
        reward_funcs: As the user gave them.
        args: The settings.

    Raises:
        ConfigError: The functions cannot be called, or have not one weight each.
    """

    def __init__(self, reward_funcs: object, args: GRPOConfig) -> None:
        functions = normalise_reward_funcs(reward_funcs)
        self._args = args
        self._caller = RewardCaller(functions, timeout_s=args.reward_timeout_s)
        self._weights = check_reward_weights(args.reward_weights, len(functions))
        self._logged: list[tuple[str, float]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the reward functions."""
        return self._caller.names

    def check(self, prompt: Prompt, tokenizer: Any) -> None:
        """Call every function once, on empty completions of `prompt`, unless `reward_preflight` is off.

        Raises:
            RewardError: One does not work.
        """
        if not self._args.reward_preflight:
            return
        loop = LoopThread("reward check")
        try:
            work = check_rewards(
                self._caller,
                prompt,
                num_generations=self._args.num_generations,
                stop_token_id=tokenizer.eos_token_id or 0,
            )
            timeout_s = self._args.reward_timeout_s + _CHECK_GRACE_S
            loop.run(work, timeout_s=timeout_s, what="the check of the reward functions")
        finally:
            loop.close()

    async def score(
        self,
        prompt: Prompt,
        rollouts: tuple[Rollout, ...],
        completions: tuple[CompletionLike, ...],
        trainer_state: object,
    ) -> ScoredGroup:
        """Reward one group.

        Raises:
            RewardError: A function failed.
        """
        score = await self._caller.score(prompt, rollouts, completions, trainer_state=trainer_state)
        self._logged.extend(score.metrics)
        return ScoredGroup(
            prompt=prompt, rollouts=rollouts, completions=completions, rewards=score.rewards, extras=score.extras
        )

    def compare(self, groups: Sequence[ScoredGroup]) -> JudgedStep:
        """Compute the advantages of a step's groups."""
        return judge(groups, self._weights, self._args)

    def metrics(self, step: JudgedStep) -> dict[str, float]:
        """Return a step's metrics, with what the functions have logged since the last call."""
        logged, self._logged = self._logged, []
        return group_metrics(step, self.names) | merge_logged(logged)
