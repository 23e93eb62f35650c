"""Call all reward functions on one group of completions, each under a time-out, and check what they answer."""

from __future__ import annotations

import asyncio
import functools
import math
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from shoal.errors import ConfigError, RewardError, RewardTimeoutError
from shoal.rewards.answers import read_rewards
from shoal.rewards.failures import describe
from shoal.rewards.functions import RewardFunction
from shoal.rewards.hooks import GroupLog
from shoal.rewards.sending import not_received, pickle_keywords, plain_state, setup_of
from shoal.rewards.threads import Outcome, run_in_daemon_thread
from shoal.rewards.worker_pool import WorkerPool
from shoal.rewards.worker_process import failure_of
from shoal.rewards.workers import WorkerEndedError
from shoal.types import CompletionLike, Prompt, RewardFailure, Rollout

OnError: TypeAlias = Literal["raise", "drop"]
"""What follows when a function fails: an error, or no reward for the samples that it failed on."""

_OWN_KEYWORDS = frozenset({"prompts", "completions", "trainer_state", "log_extra", "log_metric"})
# Columns of these names would say about the completion what only the engine can know; TRL leaves them out too.
_HIDDEN_COLUMNS = frozenset({"prompt", "completion", "completion_ids"})
_CANCEL_GRACE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScore:
    """What the reward functions said about the K completions of one prompt.

    Attributes:
        rewards: `[K, F]` float64, one column per reward function; NaN where a function answered `None`, or failed.
        extras: Columns that reward functions added with `log_extra`, each of length K.
        metrics: `(name, value)` of each `log_metric` call, in order; a name may occur several times.
        failures: What failed; empty with `on_error="raise"`.
    """

    rewards: npt.NDArray[np.float64]
    extras: Mapping[str, tuple[Any, ...]]
    metrics: tuple[tuple[str, float], ...]
    failures: tuple[RewardFailure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A group that is being scored.

    Attributes:
        prompt: The prompt.
        rollouts: The K completions as token ids.
        completions: The K completions as functions see them.
        trainer_state: Handed to the functions as it is.
        log: Collects what they log.
    """

    prompt: Prompt
    rollouts: Sequence[Rollout]
    completions: Sequence[CompletionLike]
    trainer_state: object
    log: GroupLog

    def who(self, function: RewardFunction) -> str:
        """Return the function and the dataset row, as messages are to name them."""
        return f"Reward function {function.name!r} (dataset row {self.prompt.row}, {len(self.completions)} completions)"

    def keywords(self) -> dict[str, Any]:
        """Return the arguments but for those that log: fresh lists, so that no function sees another's changes."""
        count = len(self.completions)
        columns = {name: value for name, value in self.prompt.columns.items() if name not in _HIDDEN_COLUMNS}
        return {
            "prompts": [self.prompt.prompt] * count,
            "completions": list(self.completions),
            "completion_ids": [rollout.token_ids.tolist() for rollout in self.rollouts],
            **{name: [value] * count for name, value in columns.items()},
            "trainer_state": self.trainer_state,
        }

    def loggers(self, function: RewardFunction) -> dict[str, Callable[..., None]]:
        """Return `log_extra` and `log_metric` for one function."""
        return {
            "log_extra": functools.partial(self.log.add_extra, name=function.name, who=self.who(function)),
            "log_metric": functools.partial(self.log.add_metric, who=self.who(function)),
        }


class RewardCaller:
    """Scores groups of completions with a fixed list of reward functions.

    All functions of a group run at the same time, and several groups may be scored at once from one event loop.
    Functions are called with keyword arguments only, named as in TRL: `prompts`, `completions`, `completion_ids`, every
    other column of the dataset, `trainer_state`, `log_extra` and `log_metric`. All lists have length K.

    Async functions run in the event loop. Synchronous ones run on threads, or in worker processes if there are any; a
    call that takes too long is then ended together with its process, and another process takes its place.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        *,
        timeout_s: float,
        threads_per_function: int = 1,
        num_workers: int = 0,
    ) -> None:
        """Take the functions; calls none of them.

        Args:
            functions: The reward functions, F of them.
            timeout_s: How long one call of one function may take, in seconds.
            threads_per_function: How many groups one synchronous function may be scoring at the same time, each on a
                thread of its own. With 1, a function needs not be thread-safe. Async functions have no such bound.
            num_workers: Processes that call the synchronous functions instead; 0 for threads. Each has its own copy of
                every function, so what a function remembers from one call to the next is spread over them.

        Raises:
            ConfigError: There are no functions, a bound is not positive, or a function cannot be sent to a process.
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
        self._sent = tuple(function for function in functions if not function.is_async)
        if num_workers and not self._sent:
            raise ConfigError(
                f"reward_workers={num_workers} would have nothing to do: every reward function is async, and those run "
                "side by side in the trainer's event loop. Remove reward_workers."
            )
        self._workers = WorkerPool(setup_of(self._sent), num_workers=num_workers) if num_workers else None
        # asyncio's semaphores belong to one loop; the check before training may run on another than the training.
        self._slots: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Semaphore]] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the reward functions, in the order of the columns of `GroupScore.rewards`."""
        return tuple(function.name for function in self._functions)

    async def start(self) -> None:
        """Start the worker processes, if there are to be any. What was started already is left as it is.

        Raises:
            ConfigError: A process could not make the functions anew, as when their module cannot be imported there.
        """
        if self._workers is None:
            return
        try:
            await self._workers.start()
        except RewardError as error:
            raise not_received(self._sent, error) from error

    def close(self) -> None:
        """End the worker processes. A later call starts others."""
        if self._workers is not None:
            self._workers.close()

    async def score(
        self,
        prompt: Prompt,
        rollouts: Sequence[Rollout],
        completions: Sequence[CompletionLike],
        *,
        trainer_state: object = None,
        on_error: OnError = "raise",
    ) -> GroupScore:
        """Call every function on the group and wait for all of them.

        Args:
            prompt: The prompt.
            rollouts: The K completions as token ids.
            completions: The same K completions as text, or as a list of one assistant message each.
            trainer_state: Handed to the functions as it is; to worker processes, as a copy of its attributes, with the
                last 100 entries of its `log_history`.
            on_error: Whether a function that raises, times out or answers something that is not one finite number or
                `None` per completion is an error, or a `RewardFailure` in the result. An answer that is as long as it
                should be fails the samples that it has no number for; anything else fails the whole group.

        Raises:
            RewardError: A function failed and that is an error; the other functions of the group are then cancelled. Or
                no function can be called like this, whatever `on_error` is.
        """
        if len(rollouts) != len(completions):
            raise RewardError(
                f"Dataset row {prompt.row} came with {len(rollouts)} rollouts and {len(completions)} decoded "
                "completions. They are two views of the same completions, so this is a bug in Shoal: please report it."
            )
        _refuse_clash(prompt)
        group = _Group(
            prompt=prompt,
            rollouts=rollouts,
            completions=completions,
            trainer_state=trainer_state,
            log=GroupLog(num_completions=len(completions)),
        )
        failures: list[RewardFailure] = []
        tasks = [
            asyncio.create_task(self._column(function, group, failures if on_error == "drop" else None))
            for function in self._functions
        ]
        try:
            columns = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return GroupScore(
            rewards=np.stack(columns, axis=1),
            extras=group.log.extras(),
            metrics=group.log.metrics(),
            failures=tuple(failures),
        )

    async def _column(
        self, function: RewardFunction, group: _Group, failures: list[RewardFailure] | None
    ) -> npt.NDArray[np.float64]:
        """Call one function and return its `[K]` rewards; NaN for what it failed on, if `failures` takes that."""
        count = len(group.completions)
        try:
            answer = await self._call(function, group)
            read = read_rewards(answer, num_completions=count, who=group.who(function))
        except RewardError as error:
            if failures is None:
                raise
            kind: Literal["error", "timeout"] = "timeout" if isinstance(error, RewardTimeoutError) else "error"
            failures.append(
                RewardFailure(function=function.name, kind=kind, samples=tuple(range(count)), message=str(error))
            )
            return np.full(count, np.nan)
        if read.faults:
            message = next(iter(read.faults.values()))
            if failures is None:
                raise RewardError(message)
            failures.append(
                RewardFailure(function=function.name, kind="error", samples=tuple(read.faults), message=message)
            )
        return read.values

    async def _call(self, function: RewardFunction, group: _Group) -> Any:
        """Call one function and return its answer, whatever that is.

        Raises:
            RewardError: It raised, did not answer in time, or could not be called.
        """
        who = group.who(function)
        try:
            if self._workers is not None and not function.is_async:
                return await self._call_in_worker(self._workers, function, group)
            outcome = await self._call_here(function, group)
        except TimeoutError:
            raise RewardTimeoutError(
                f"{who} did not answer within {self._timeout_s:g} s and was given up on: {self._what_remains(function)}"
                ". Give it a time limit of its own, or raise the time-out of reward functions if it needs longer."
            ) from None
        if isinstance(outcome.error, RewardError):
            raise outcome.error
        if outcome.error is not None:
            raise RewardError(describe(failure_of(outcome.error), who)) from outcome.error
        return outcome.value

    async def _call_here(self, function: RewardFunction, group: _Group) -> Outcome:
        keywords = {**group.keywords(), **group.loggers(function)}
        if function.is_async:
            return await _await_within(_invoke(function, keywords), timeout_s=self._timeout_s)
        async with self._slot(function):
            return await run_in_daemon_thread(
                functools.partial(function.function, **keywords),
                timeout_s=self._timeout_s,
                name=f"shoal-reward-{function.name}",
            )

    async def _call_in_worker(self, workers: WorkerPool, function: RewardFunction, group: _Group) -> Any:
        who = group.who(function)
        index = next(index for index, sent in enumerate(self._sent) if sent is function)
        state = {"trainer_state": plain_state(group.trainer_state)}
        keywords = pickle_keywords(group.keywords() | state, who=who)
        try:
            reply = await workers.call(
                {"function": index, "arguments": (), "keywords": keywords, "logs": True}, timeout_s=self._timeout_s
            )
        except WorkerEndedError as error:
            raise RewardError(
                f"{who} did not answer: {error} during the call. Another takes its place; look for what ends a whole "
                "process, such as os._exit, a crash in native code or the memory running out."
            ) from error
        loggers = group.loggers(function)
        for hook, name, value in reply["logs"]:
            loggers[f"log_{hook}"](name, value)
        if (failure := reply["failure"]) is not None:
            failed = RewardError(describe(failure, who))
            failed.add_note(failure["trace"])
            raise failed
        return reply["value"]

    def _what_remains(self, function: RewardFunction) -> str:
        if function.is_async:
            return "its task was cancelled"
        if self._workers is not None:
            return "its worker process was killed and is replaced"
        return "its thread cannot be stopped and runs on until the process ends (reward_workers=1 makes it a process)"

    def _slot(self, function: RewardFunction) -> asyncio.Semaphore:
        """Return what bounds the threads of one synchronous function on the running loop."""
        slots = self._slots.setdefault(asyncio.get_running_loop(), {})
        if function.name not in slots:
            slots[function.name] = asyncio.Semaphore(self._threads_per_function)
        return slots[function.name]


def _refuse_clash(prompt: Prompt) -> None:
    clash = sorted(_OWN_KEYWORDS & prompt.columns.keys())
    if clash:
        raise RewardError(
            f"The dataset has a column {clash[0]!r} (seen in row {prompt.row}), and reward functions get Shoal's own "
            f"argument of that name. Rename it: dataset.rename_column({clash[0]!r}, ...)."
        )


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
