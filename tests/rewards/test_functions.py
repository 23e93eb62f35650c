"""What may be passed as `reward_funcs`, and under which names it is reported."""

import functools
from typing import Any

import pytest
import torch

from shoal.errors import ConfigError
from shoal.rewards.functions import normalise_reward_funcs


def score(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.0 for _ in completions]


async def score_later(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.0 for _ in completions]


class Judge:
    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [0.0 for _ in completions]


class AsyncJudge:
    async def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [0.0 for _ in completions]


def test_one_function_becomes_a_tuple_of_one() -> None:
    (function,) = normalise_reward_funcs(score)
    assert (function.name, function.function, function.is_async) == ("score", score, False)


def test_names_come_from_functions_classes_and_what_a_partial_wraps() -> None:
    functions = normalise_reward_funcs([score, Judge(), functools.partial(functools.partial(score_later), a=1)])
    assert [function.name for function in functions] == ["score", "Judge", "score_later"]


def test_async_is_recognised_in_functions_partials_and_callable_objects() -> None:
    functions = normalise_reward_funcs([score, score_later, functools.partial(score_later), Judge(), AsyncJudge()])
    assert [function.is_async for function in functions] == [False, True, True, False, True]


def test_repeated_names_are_numbered() -> None:
    assert [function.name for function in normalise_reward_funcs([score] * 3)] == ["score", "score_2", "score_3"]


def test_a_number_is_not_given_twice() -> None:
    def score_2(completions: list[str], **kwargs: Any) -> list[float]:
        return [0.0 for _ in completions]

    names = [function.name for function in normalise_reward_funcs([score, score, score_2])]
    assert names == ["score", "score_3", "score_2"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "reward_funcs is empty"),
        (None, "reward_funcs is None"),
        (3, "reward_funcs is 3 .int."),
        ("org/reward-model", "'org/reward-model' names a reward model.*pass a function"),
        ([score, "org/reward-model"], r"reward_funcs\[1\]='org/reward-model'"),
        (torch.nn.Linear(1, 1), "is a Linear .*Wrap it in a function"),
        (Judge, r"is the class Judge, not an object.*Judge\(\.\.\.\)"),
    ],
)
def test_what_cannot_be_called_is_refused_with_what_to_do(wrong: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        normalise_reward_funcs(wrong)
