"""Calling reward functions: what they receive, what they may answer, and what happens when they fail."""

import asyncio
import functools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from shoal.errors import ConfigError, RewardError
from shoal.rewards.caller import GroupScore, RewardCaller
from shoal.rewards.functions import normalise_reward_funcs
from shoal.types import Prompt, PromptLike, Rollout

K = 3


def make_prompt(*, row: int = 7, prompt: PromptLike = "1+1=", columns: Mapping[str, Any] | None = None) -> Prompt:
    return Prompt(row=row, prompt=prompt, token_ids=(1, 2), columns={"answer": "2"} if columns is None else columns)


def make_rollouts(count: int = K) -> list[Rollout]:
    return [
        Rollout(
            token_ids=np.arange(index + 1, dtype=np.int32),
            rollout_logprobs=np.zeros(index + 1, dtype=np.float32),
            finish_reason="stop",
            weight_version=0,
            engine="engine-0",
        )
        for index in range(count)
    ]


def score(
    functions: object, *, timeout_s: float = 5.0, prompt: Prompt | None = None, state: object = None
) -> GroupScore:
    caller = RewardCaller(normalise_reward_funcs(functions), timeout_s=timeout_s)
    return asyncio.run(caller.score(prompt or make_prompt(), make_rollouts(), ["a", "bb", "ccc"], trainer_state=state))


def answering(answer: object) -> Callable[..., object]:
    def fixed(**kwargs: Any) -> object:
        return answer

    return fixed


def test_a_function_receives_the_keywords_that_trl_gives() -> None:
    received: dict[str, Any] = {}

    def spy(**kwargs: Any) -> list[float]:
        received.update(kwargs)
        return [0.0] * K

    state = object()
    columns = {"answer": "2", "prompt": "hidden", "completion": "hidden", "completion_ids": "hidden"}
    score(spy, prompt=make_prompt(columns=columns), state=state)
    assert callable(received.pop("log_extra")) and callable(received.pop("log_metric"))
    assert received == {
        "prompts": ["1+1="] * K,
        "completions": ["a", "bb", "ccc"],
        "completion_ids": [[0], [0, 1], [0, 1, 2]],
        "answer": ["2"] * K,
        "trainer_state": state,
    }
    assert type(received["completion_ids"][2][1]) is int


def test_each_function_is_a_column_in_order_whether_sync_or_async() -> None:
    def lengths(completions: list[str], **kwargs: Any) -> list[int]:
        return [len(text) for text in completions]

    async def matches(completions: list[str], answer: list[str], **kwargs: Any) -> list[bool]:
        await asyncio.sleep(0)
        return [text == "bb" and gold == "2" for text, gold in zip(completions, answer, strict=True)]

    result = score([lengths, matches])
    assert result.rewards.dtype == np.float64
    assert result.rewards.tolist() == [[1, 0], [2, 1], [3, 0]]


@pytest.mark.parametrize(
    "answer",
    [
        [1, True, 0.5],
        (1.0, 1.0, 0.5),
        np.array([1, 1, 0.5], dtype=np.float32),
        torch.tensor([1, 1, 0.5], dtype=torch.bfloat16, requires_grad=True),
        [np.float32(1), np.bool_(True), torch.tensor(0.5)],
        [np.int64(1), np.array(1), 0.5],
    ],
    ids=["list", "tuple", "numpy", "torch", "scalars", "integers"],
)
def test_lists_tuples_arrays_and_tensors_are_read_alike(answer: object) -> None:
    assert score(answering(answer)).rewards[:, 0].tolist() == [1.0, 1.0, 0.5]


def test_none_means_not_applicable_and_becomes_nan() -> None:
    rewards = score(answering([1.0, None, 0.0])).rewards[:, 0]
    assert np.isnan(rewards).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0], r"'fixed' \(dataset row 7, 3 completions\) returned 2 rewards for 3 completions: \[1.0, 2.0\]"),
        ([1.0] * 4, "returned 4 rewards for 3"),
        (1.0, r"returned 1.0 \(float\), which is not a list"),
        (None, "returned None .NoneType."),
        ("abc", "returned 'abc' .str., which is not a list"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "dict., which is not a list"),
        (np.zeros((3, 1)), r"array of shape \(3, 1\).*squeeze"),
        (torch.zeros(3, 2), r"array of shape \(3, 2\)"),
        ([1.0, "good", 0.0], "returned 'good' .str. for sample 1"),
        ([1.0, [1.0], 0.0], "list. for sample 1"),
        ([1.0, 0.0, float("nan")], "returned nan for sample 2.*Return None"),
        (np.array([np.inf, 0, 0]), "returned inf for sample 0"),
        ([0, 10**400, 0], "returned inf for sample 1"),
    ],
)
def test_a_wrong_answer_is_an_error_that_shows_it(answer: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score(answering(answer))


def test_a_function_that_raises_is_named_with_the_row_and_the_cause() -> None:
    def broken(completions: list[str], **kwargs: Any) -> list[float]:
        raise KeyError("answr")

    with pytest.raises(
        RewardError, match=r"'broken' \(dataset row 7, .*KeyError: 'answr' at .*test_caller.py"
    ) as caught:
        score(broken)
    assert isinstance(caught.value.__cause__, KeyError)
    assert type(caught.value) is RewardError


@pytest.mark.parametrize("raised", [StopIteration("x"), SystemExit(3), TimeoutError("mine"), asyncio.CancelledError()])
def test_exceptions_that_event_loops_treat_specially_are_errors_like_others(raised: BaseException) -> None:
    def broken(**kwargs: Any) -> list[float]:
        raise raised

    with pytest.raises(RewardError, match=f"raised {type(raised).__name__}"):
        score(broken)


@pytest.mark.parametrize("raised", [TimeoutError("mine"), asyncio.CancelledError()])
def test_an_async_functions_own_time_out_is_not_mistaken_for_ours(raised: BaseException) -> None:
    async def broken(**kwargs: Any) -> list[float]:
        raise raised

    with pytest.raises(RewardError, match=f"raised {type(raised).__name__}"):
        score(broken)


def test_a_function_without_kwargs_is_told_to_take_them() -> None:
    def sync(completions: list[str]) -> list[float]:
        return [0.0] * K

    async def later(completions: list[str]) -> list[float]:
        return [0.0] * K

    for function in (sync, later):
        with pytest.raises(RewardError, match=r"add \*\*kwargs"):
            score(function)


def test_a_coroutine_from_an_undeclared_function_is_explained() -> None:
    async def later(**kwargs: Any) -> list[float]:
        return [0.0] * K

    with pytest.raises(RewardError, match="async def"):
        score(lambda **kwargs: later(**kwargs))


def test_a_column_named_like_an_argument_is_refused() -> None:
    with pytest.raises(RewardError, match=r"column 'prompts'.*rename_column"):
        score(answering([0.0] * K), prompt=make_prompt(columns={"prompts": 1}))


def test_all_functions_of_a_group_run_at_the_same_time() -> None:
    meeting = threading.Barrier(4)  # broken by its time-out unless all four are there together

    def sync(**kwargs: Any) -> list[float]:
        meeting.wait(timeout=60)
        return [1.0] * K

    async def later(**kwargs: Any) -> list[float]:
        await asyncio.to_thread(meeting.wait, 60)
        return [1.0] * K

    assert score([sync, later, sync, later]).rewards.tolist() == [[1.0] * 4] * K


def test_a_sync_function_hangs_only_until_its_time_out() -> None:
    release = threading.Event()

    def hangs(**kwargs: Any) -> list[float]:
        release.wait(300)
        return [0.0] * K

    began = time.monotonic()
    try:
        with pytest.raises(RewardError, match=r"'hangs' .* did not answer within 0.1 s.*thread cannot be stopped"):
            score(hangs, timeout_s=0.1)
    finally:
        release.set()
    assert time.monotonic() - began < 60


def test_an_async_function_that_ignores_its_cancellation_is_left_behind() -> None:
    async def run() -> None:
        release = asyncio.Event()

        async def stubborn(**kwargs: Any) -> list[float]:
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue
            return [0.0] * K

        caller = RewardCaller(normalise_reward_funcs(stubborn), timeout_s=0.05)
        try:
            with pytest.raises(RewardError, match=r"did not answer within 0.05 s.*task was cancelled"):
                await caller.score(make_prompt(), make_rollouts(), ["a", "bb", "ccc"])
        finally:
            release.set()
            await asyncio.sleep(0)

    began = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - began < 60


def test_a_failing_function_cancels_the_others() -> None:
    cancelled: list[bool] = []

    def broken(**kwargs: Any) -> list[float]:
        raise ValueError("no")

    async def slow(**kwargs: Any) -> list[float]:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return [0.0] * K

    with pytest.raises(RewardError, match="broken"):
        score([slow, broken])
    assert cancelled == [True]


def test_a_hung_thread_lets_the_interpreter_exit() -> None:
    program = """
import asyncio, time
import numpy as np
from shoal.errors import RewardError
from shoal.rewards import RewardCaller, normalise_reward_funcs
from shoal.types import Prompt, Rollout

def hangs(**kwargs):
    time.sleep(600)

prompt = Prompt(row=0, prompt="p", token_ids=(1,), columns={})
rollout = Rollout(token_ids=np.zeros(1, np.int32), rollout_logprobs=np.zeros(1, np.float32), finish_reason="stop",
                  weight_version=0, engine="e")
caller = RewardCaller(normalise_reward_funcs(hangs), timeout_s=0.1)
try:
    asyncio.run(caller.score(prompt, [rollout], ["c"]))
except RewardError:
    print("gave up")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.returncode) == ("gave up", 0), done.stderr


def test_one_sync_function_scores_one_group_at_a_time_unless_told_otherwise() -> None:
    def most_at_once(threads: int) -> int:
        lock, running, most = threading.Lock(), 0, 0

        def counts(**kwargs: Any) -> list[float]:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.05)
            with lock:
                running -= 1
            return [0.0] * K

        async def run() -> None:
            caller = RewardCaller(normalise_reward_funcs(counts), timeout_s=5, threads_per_function=threads)
            await asyncio.gather(
                *(caller.score(make_prompt(row=row), make_rollouts(), ["a", "b", "c"]) for row in range(4))
            )

        asyncio.run(run())
        return most

    assert most_at_once(1) == 1
    assert most_at_once(4) > 1


def test_what_groups_log_at_the_same_time_does_not_mix() -> None:
    def logs(prompts: list[str], row: list[int], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("row", row[0])
        time.sleep(0.01)
        log_extra("row", row)
        return [0.0] * K

    async def logs_later(row: list[int], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        await asyncio.sleep(0.01)
        log_extra("later", np.array(row))
        log_metric("later", np.float64(row[0]))
        return [0.0] * K

    async def run() -> list[GroupScore]:
        caller = RewardCaller(normalise_reward_funcs([logs, logs_later]), timeout_s=5, threads_per_function=8)
        return await asyncio.gather(
            *(
                caller.score(make_prompt(row=row, columns={"row": row}), make_rollouts(), ["a", "b", "c"])
                for row in range(20)
            )
        )

    for row, result in enumerate(asyncio.run(run())):
        assert result.extras == {"row": (row,) * K, "later": (row,) * K}
        assert sorted(result.metrics) == [("later", float(row)), ("row", float(row))]


def test_a_caller_serves_a_second_event_loop() -> None:
    def slow(**kwargs: Any) -> list[float]:
        time.sleep(0.02)
        return [1.0] * K

    caller = RewardCaller(normalise_reward_funcs(slow), timeout_s=5)

    async def two_groups() -> None:
        call = functools.partial(caller.score, make_prompt(), make_rollouts(), ["a", "b", "c"])
        await asyncio.gather(call(), call())

    asyncio.run(two_groups())
    asyncio.run(two_groups())


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (lambda extra, metric: extra("note", [1, 2]), r"log_extra\('note', …\) with 2 values for 3 completions"),
        (lambda extra, metric: extra("note", "abc"), r"log_extra\('note', 'abc'\), which is not a list"),
        (lambda extra, metric: metric("share", "half"), r"log_metric\('share', 'half'\) with a str"),
    ],
)
def test_wrong_logging_is_an_error_that_names_the_function(log: Callable[..., None], message: str) -> None:
    def logs(log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        log(log_extra, log_metric)
        return [0.0] * K

    with pytest.raises(RewardError, match=f"'logs' .*{message}"):
        score(logs)


def test_two_functions_may_not_log_the_same_column() -> None:
    def logs(log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("note", ["x"] * K)
        return [0.0] * K

    with pytest.raises(RewardError, match=r"logged the column 'note', which reward function 'logs(_2)?' logs too"):
        score([logs, logs])


def test_a_function_may_replace_its_own_column() -> None:
    def logs(log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("note", ["x"] * K)
        log_extra("note", ["y"] * K)
        return [0.0] * K

    assert score(logs).extras == {"note": ("y",) * K}


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("inf"), float("nan")])
def test_there_is_no_waiting_without_a_limit(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="time-out of reward functions"):
        RewardCaller(normalise_reward_funcs(answering([])), timeout_s=timeout_s)
