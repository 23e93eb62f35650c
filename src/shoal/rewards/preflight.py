"""Call the reward functions once before anything starts, so that a broken one costs seconds instead of a run."""

from __future__ import annotations

import numpy as np

from shoal.errors import RewardError
from shoal.rewards.caller import RewardCaller
from shoal.types import CompletionLike, Prompt, Rollout


async def check_rewards(
    caller: RewardCaller, prompt: Prompt, *, num_generations: int, stop_token_id: int, trainer_state: object = None
) -> None:
    """Score one group of empty completions and throw the result away.

    A completion with no text is one that a model can really write: the stop token and nothing before it. What the
    functions log is thrown away too; what else they do (files, counters) happens once more than they may expect.

    Args:
        caller: What calls the reward functions.
        prompt: The first prompt of the dataset.
        num_generations: How many completions a group has, K.
        stop_token_id: The only token of each empty completion.
        trainer_state: Handed to the functions as it is.

    Raises:
        RewardError: A function raised, timed out or answered something that is not one number or `None` per completion.
    """
    empty: CompletionLike = "" if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": ""}]
    rollout = Rollout(
        token_ids=np.array([stop_token_id], dtype=np.int32),
        rollout_logprobs=np.zeros(1, dtype=np.float32),
        finish_reason="stop",
        weight_version=0,
        engine="preflight",
    )
    try:
        await caller.score(prompt, [rollout] * num_generations, [empty] * num_generations, trainer_state=trainer_state)
    except RewardError as error:
        raise RewardError(
            f"{error}\nThis was a check before training: every reward function is called once on {num_generations} "
            "empty completions of the first prompt, which a model can write at any time. Nothing was started. Correct "
            "the function so that it can judge an empty completion, or turn the check off with reward_preflight=False."
        ) from error
