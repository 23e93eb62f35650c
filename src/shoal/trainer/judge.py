"""Everything between a completion and its advantage: call the reward functions, compare, and say what came of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

from shoal.config import GRPOConfig
from shoal.errors import RewardError
from shoal.rewards import FailureLog, OnError, RewardCaller, check_rewards, normalise_reward_funcs
from shoal.rollout.loop_thread import LoopThread
from shoal.trainer.checks import check_reward_weights
from shoal.trainer.groups import JudgedStep, failure_metrics, group_metrics, judge, merge_logged
from shoal.types import CompletionLike, Prompt, Rollout, ScoredGroup

logger = logging.getLogger(__name__)

_CHECK_GRACE_S = 10.0
_START_TIMEOUT_S = 180.0
MOST_EMPTY_STEPS = 3
"""So many steps in a row, of which reward functions failed on everything, end the run."""


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
        self._caller = RewardCaller(functions, timeout_s=args.reward_timeout_s, num_workers=args.reward_workers)
        self._weights = check_reward_weights(args.reward_weights, len(functions))
        self._logged: list[tuple[str, float]] = []
        self._failures = FailureLog()
        self._num_empty_steps = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the reward functions."""
        return self._caller.names

    def check(self, prompt: Prompt, tokenizer: Any) -> None:
        """Start worker processes, if there are to be any, and call every function once, on empty completions.

        The call is left out if `reward_preflight` is off. What fails in it is an error whatever `reward_on_error` is: a
        function that cannot work at all is better known before anything starts.

        Args:
            prompt: What the completions are of.
            tokenizer: The policy's.

        Raises:
            ConfigError: A function cannot be called in a worker process.
            RewardError: One does not work.
        """
        loop = LoopThread("reward check")
        try:
            loop.run(self._caller.start(), timeout_s=_START_TIMEOUT_S, what="worker processes for rewards to start")
            if not self._args.reward_preflight:
                return
            work = check_rewards(
                self._caller,
                prompt,
                num_generations=self._args.num_generations,
                stop_token_id=tokenizer.eos_token_id or 0,
            )
            timeout_s = self._args.reward_timeout_s + _CHECK_GRACE_S
            loop.run(work, timeout_s=timeout_s, what="the check of the reward functions")
        except BaseException:
            self.close()
            raise
        finally:
            loop.close()

    def close(self) -> None:
        """End the worker processes. A later call of a function starts others."""
        self._caller.close()

    async def score(
        self,
        prompt: Prompt,
        rollouts: tuple[Rollout, ...],
        completions: tuple[CompletionLike, ...],
        trainer_state: object,
    ) -> ScoredGroup:
        """Reward one group.

        Raises:
            RewardError: A function failed, and `reward_on_error` is `"raise"`.
        """
        score = await self._caller.score(
            prompt,
            rollouts,
            completions,
            trainer_state=trainer_state,
            on_error=cast(OnError, self._args.reward_on_error),
        )
        self._logged.extend(score.metrics)
        for failure in score.failures:
            self._failures.note(failure)
        return ScoredGroup(
            prompt=prompt,
            rollouts=rollouts,
            completions=completions,
            rewards=score.rewards,
            extras=score.extras,
            failures=score.failures,
        )

    def compare(self, groups: Sequence[ScoredGroup]) -> JudgedStep:
        """Compute the advantages of a step's groups."""
        return judge(groups, self._weights, self._args)

    def metrics(self, step: JudgedStep) -> dict[str, float]:
        """Return a step's metrics, with what the functions have logged since the last call."""
        logged, self._logged = self._logged, []
        failed = failure_metrics(step.groups, self.names) if self._args.reward_on_error == "drop" else {}
        return group_metrics(step, self.names) | failed | merge_logged(logged)

    def count_empty(self, step: JudgedStep) -> None:
        """Take note of a training step, and stop the run when nothing is left of one after the other.

        Raises:
            RewardError: It is the last of several steps in a row of which nothing is left.
        """
        if not all(group.dropped.all() for group in step.groups):
            self._num_empty_steps = 0
            return
        self._num_empty_steps += 1
        last = step.groups[-1].failures[-1].message
        if self._num_empty_steps >= MOST_EMPTY_STEPS:
            raise RewardError(
                f"Reward functions failed on all {len(step.groups)} groups of {self._num_empty_steps} steps in a row, "
                f"so nothing is trained on although reward_on_error='drop' would go on. The last failure: {last} "
                "Correct the function, or what it depends on, and resume from the last checkpoint."
            )
        logger.warning(
            "Reward functions failed on all %d groups of this step: it leaves the weights as they are. After %d such "
            "steps in a row the run ends. The last failure: %s",
            len(step.groups),
            MOST_EMPTY_STEPS,
            last,
        )
