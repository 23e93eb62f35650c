"""The check of reward functions before training."""

import asyncio
from typing import Any

import pytest

from shoal.errors import RewardError
from shoal.rewards.caller import RewardCaller
from shoal.rewards.functions import normalise_reward_funcs
from shoal.rewards.preflight import check_rewards
from shoal.types import Prompt, PromptLike


def check(function: object, *, prompt: PromptLike = "hello") -> None:
    caller = RewardCaller(normalise_reward_funcs(function), timeout_s=5)
    row = Prompt(row=0, prompt=prompt, token_ids=(1,), columns={"answer": 2})
    asyncio.run(check_rewards(caller, row, num_generations=4, stop_token_id=9))


def test_functions_see_empty_completions_of_the_prompts_kind() -> None:
    seen: list[Any] = []

    def spy(prompts: list[Any], completions: list[Any], completion_ids: list[Any], **kwargs: Any) -> list[float]:
        seen.append((completions, completion_ids))
        return [0.0] * len(prompts)

    check(spy)
    check(spy, prompt=[{"role": "user", "content": "hello"}])
    assert seen == [
        ([""] * 4, [[9]] * 4),
        ([[{"role": "assistant", "content": ""}]] * 4, [[9]] * 4),
    ]


def test_a_function_that_fails_on_them_is_told_what_the_check_is_and_how_to_turn_it_off() -> None:
    def divides(completions: list[str], **kwargs: Any) -> list[float]:
        return [1 / len(text) for text in completions]

    with pytest.raises(
        RewardError, match=r"(?s)'divides'.*ZeroDivisionError.*empty completions.*reward_preflight=False"
    ):
        check(divides)


@pytest.mark.parametrize(
    ("answer", "message"), [([0.0], "1 rewards for 4"), ([0.0, 0.0, 0.0, float("nan")], "nan for sample 3")]
)
def test_wrong_answers_are_found_too(answer: list[float], message: str) -> None:
    def wrong(**kwargs: Any) -> list[float]:
        return answer

    with pytest.raises(RewardError, match=message):
        check(wrong)
