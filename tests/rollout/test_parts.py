"""A completion that several engines write in turn."""

from __future__ import annotations

import numpy as np

from shoal.rollout.parts import go_on, join
from shoal.types import FinishReason, Rollout, RolloutRequest, SamplingSettings

REQUEST = RolloutRequest(
    prompt_token_ids=(7, 8), seed=5, sampling=SamplingSettings(temperature=1.0, max_tokens=10, stop_token_ids=(2,))
)


def part(tokens: list[int], finish_reason: FinishReason = "cut", *, version: int = 3, engine: str = "e0") -> Rollout:
    return Rollout(
        token_ids=np.array(tokens, dtype=np.int32),
        rollout_logprobs=-np.array(tokens, dtype=np.float32),
        finish_reason=finish_reason,
        weight_version=version,
        engine=engine,
    )


def test_a_completion_that_has_not_begun_is_asked_for_as_it_is() -> None:
    for parts in ([], [part([])]):
        request = go_on(REQUEST, parts, name="x")
        assert (request.prompt_token_ids, request.seed, request.sampling) == ((7, 8), 5, REQUEST.sampling)
        assert request.name == "x"


def test_what_is_missing_is_asked_for_after_the_tokens_that_there_are_and_with_another_seed() -> None:
    request = go_on(REQUEST, [part([11, 12]), part([13])], name="x")
    assert request.prompt_token_ids == (7, 8, 11, 12, 13)
    assert request.sampling.max_tokens == 7
    assert request.sampling.stop_token_ids == (2,)
    assert 0 <= request.seed < 2**31 and request.seed not in (5, go_on(REQUEST, [part([11])], name="x").seed)


def test_the_parts_are_one_completion_with_the_oldest_weights() -> None:
    whole = join([part([11, 12], version=4), part([13], version=3), part([14, 2], "stop", version=5, engine="e1")])
    assert whole.token_ids.tolist() == [11, 12, 13, 14, 2] and whole.token_ids.dtype == np.int32
    assert whole.rollout_logprobs.tolist() == [-11, -12, -13, -14, -2] and whole.rollout_logprobs.dtype == np.float32
    assert (whole.finish_reason, whole.weight_version, whole.engine) == ("stop", 3, "e1")


def test_a_completion_of_one_part_is_that_part() -> None:
    only = part([11, 2], "stop")
    assert join([only]) is only
