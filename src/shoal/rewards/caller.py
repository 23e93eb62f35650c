"""Call all reward functions on one group of completions, each under a time-out, and check what they answer."""

from __future__ import annotations

import asyncio
import functools
import math
import traceback
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.errors import ConfigError, RewardError
from shoal.rewards.answers import read_rewards
from shoal.rewards.functions import RewardFunction
from shoal.rewards.hooks import GroupLog
from shoal.rewards.threads import Outcome, run_in_daemon_thread
from shoal.types import CompletionLike, Prompt, Rollout

_OWN_KEYWORDS = frozenset({"prompts", "completions", "trainer_state", "log_extra", "log_metric"})
# Columns of these names would say about the completion what only the engine can know; TRL leaves them out too.
_HIDDEN_COLUMNS = frozenset({"prompt", "completion", "completion_ids"})
_CANCEL_GRACE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScore:
    """What the reward functions said about the K completions of one prompt.

    Attributes:
        rewards: `[K, F]` float64, one column per reward function; NaN where a function answered `None`.
        extras: Columns that reward functions added with `log_extra`, each of length K.
        metrics: `(name, value)` of each `log_metric` call, in order; a name may occur several times.
    """

    rewards: npt.NDArray[np.float64]
    extras: Mapping[str, tuple[Any, ...]]
    metrics: tuple[tuple[str, float], ...]


class RewardCaller:
    """Scores groups of completions with a fixed list of reward functions.

    All functions of a group run at the same time, and several groups may be scored at once from one event loop.
    Functions are called with keyword arguments only, named as in TRL: `prompts`, `completions`, `completion_ids`, every
    other column of the dataset, `trainer_state`, `log_extra` and `log_metric`. All lists have length K.
    """

    def __init__(self, functions: Sequence[RewardFunction], *, timeout_s: float, threads_per_function: int = 1) -> None:
        """Take the functions; calls none of them.

        Args:
            functions: The reward functions, F of them.
            timeout_s: How long one call of one function may take, in seconds.
            threads_per_function: How many groups one synchronous function may be scoring at the same time, each on a
                thread of its own. With 1, a function needs not be thread-safe. Async functions have no such bound.

        Raises:
            ConfigError: There are no functions, or a bound is not positive.
        """
        if not functions:
            raise ConfigError("There are no reward functions to call. Pass at least one as reward_funcs.")
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise ConfigError(
                f"The time-out of reward functions is {timeout_s} s. No wait goes without a limit; set a positive "
                "number of seconds, as large as the slowest call may need."
            )
        if threads_per_function < 1:
            raise ConfigError(
                f"threads_per_function={threads_per_function} leaves no thread for a function to run on. Set 1 or more."
            )
        self._functions = tuple(functions)
        self._timeout_s = timeout_s
        self._threads_per_function = threads_per_function
        # asyncio's semaphores belong to one loop; the check before training may run on another than the training.
        self._slots: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Semaphore]] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the reward functions, in the order of the columns of `GroupScore.rewards`."""
        return tuple(function.name for function in self._functions)

    async def score(
        self,
        prompt: Prompt,
        rollouts: Sequence[Rollout],
        completions: Sequence[CompletionLike],
        *,
        trainer_state: object = None,
    ) -> GroupScore:
        """Call every function on the group and wait for all of them.

        Args:
            prompt: The prompt.
            rollouts: The K completions as token ids.
            completions: The same K completions as text, or as a list of one assistant message each.
            trainer_state: Handed to the functions as it is.

        Raises:
            RewardError: A function raised, timed out or answered something that is not one number or `None` per
                completion. The other functions of the group are then cancelled.
        """
        if len(rollouts) != len(completions):
            raise RewardError(
                f"Dataset row {prompt.row} came with {len(rollouts)} rollouts and {len(completions)} decoded "
                "completions. They are two views of the same completions, so this is a bug in Shoal: please report it."
            )
        log = GroupLog(num_completions=len(completions))
        base = _shared_keywords(prompt, trainer_state)
        tasks = [
            asyncio.create_task(self._call(function, prompt, rollouts, completions, base, log))
            for function in self._functions
        ]
        try:
            columns = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return GroupScore(rewards=np.stack(columns, axis=1), extras=log.extras(), metrics=log.metrics())

    async def _call(
        self,
        function: RewardFunction,
        prompt: Prompt,
        rollouts: Sequence[Rollout],
        completions: Sequence[CompletionLike],
        base: Mapping[str, Any],
        log: GroupLog,
    ) -> npt.NDArray[np.float64]:
        """Call one function and return its `[K]` rewards."""
        count = len(completions)
        who = f"Reward function {function.name!r} (dataset row {prompt.row}, {count} completions)"
        keywords = {
            # Fresh lists for each function, so that one which changes them does not change what the others see.
            "prompts": [prompt.prompt] * count,
            "completions": list(completions),
            "completion_ids": [rollout.token_ids.tolist() for rollout in rollouts],
            **{column: [value] * count for column, value in prompt.columns.items() if column not in _HIDDEN_COLUMNS},
            **base,
            "log_extra": functools.partial(log.add_extra, name=function.name, who=who),
            "log_metric": functools.partial(log.add_metric, who=who),
        }
        try:
            outcome = await self._run(function, keywords)
        except TimeoutError:
            raise RewardError(
                f"{who} did not answer within {self._timeout_s:g} s and was given up on: {_what_remains(function)}. "
                "Give it a time limit of its own, or raise the time-out of reward functions if it needs longer."
            ) from None
        if isinstance(outcome.error, RewardError):
            raise outcome.error
        if outcome.error is not None:
            raise RewardError(_describe(outcome.error, who)) from outcome.error
        return read_rewards(outcome.value, num_completions=count, who=who)

    async def _run(self, function: RewardFunction, keywords: Mapping[str, Any]) -> Outcome:
        if function.is_async:
            return await _await_within(_invoke(function, keywords), timeout_s=self._timeout_s)
        async with self._slot(function):
            return await run_in_daemon_thread(
                functools.partial(function.function, **keywords),
                timeout_s=self._timeout_s,
                name=f"shoal-reward-{function.name}",
            )

    def _slot(self, function: RewardFunction) -> asyncio.Semaphore:
        """Return what bounds the threads of one synchronous function on the running loop."""
        slots = self._slots.setdefault(asyncio.get_running_loop(), {})
        if function.name not in slots:
            slots[function.name] = asyncio.Semaphore(self._threads_per_function)
        return slots[function.name]


def _shared_keywords(prompt: Prompt, trainer_state: object) -> dict[str, Any]:
    clash = sorted(_OWN_KEYWORDS & prompt.columns.keys())
    if clash:
        raise RewardError(
            f"The dataset has a column {clash[0]!r} (seen in row {prompt.row}), and reward functions get Shoal's own "
            f"argument of that name. Rename it: dataset.rename_column({clash[0]!r}, ...)."
        )
    return {"trainer_state": trainer_state}


def _what_remains(function: RewardFunction) -> str:
    if function.is_async:
        return "its task was cancelled"
    return "its thread cannot be stopped and runs on until the process ends"


async def _invoke(function: RewardFunction, keywords: Mapping[str, Any]) -> Any:
    """Call an async function inside the task, so that arguments it does not take are its error like any other."""
    return await function.function(**keywords)


async def _await_within(coroutine: Coroutine[Any, Any, Any], *, timeout_s: float) -> Outcome:
    """Await a user's coroutine. One that swallows its cancellation is left behind, not waited for.

    Raises:
        TimeoutError: It is still running after `timeout_s`.
    """
    task = asyncio.ensure_future(coroutine)
    try:
        finished, _ = await asyncio.wait({task}, timeout=timeout_s)
        if not finished:
            raise TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_GRACE_S)
    if task.cancelled():
        return Outcome(value=None, error=asyncio.CancelledError("the reward function cancelled itself"))
    error = task.exception()
    return Outcome(value=task.result() if error is None else None, error=error)


def _describe(error: BaseException, who: str) -> str:
    """Say what was raised, and where in the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f' at "{frames[-1].filename}", line {frames[-1].lineno}' if frames else ""
    what = "\n".join(str(error).splitlines()[:5])
    message = f"{who} raised {type(error).__name__}: {what}{where}."
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return (
            f"{message} Reward functions are called with prompts, completions, completion_ids, every dataset column, "
            "trainer_state, log_extra and log_metric: add **kwargs to its parameters for those it does not use."
        )
    return f"{message} Correct the function, or let it return None for completions that it cannot judge."
