"""Say what went wrong in a reward function, whole to whoever raises it and seldom to the log."""

from __future__ import annotations

import logging
from collections import Counter

from shoal.rewards.worker_process import Failure
from shoal.types import RewardFailure

logger = logging.getLogger(__name__)

_SAY_EVERY = 100


def describe(failure: Failure, who: str) -> str:
    """Say what a function raised, where in the user's code, and what to do.

    Args:
        failure: What it raised.
        who: The function and the dataset row, as messages are to name them.
    """
    if failure["is_ours"]:
        return failure["text"]
    message = f"{who} raised {failure['kind']}: {failure['text']}{failure['where']}."
    if failure["kind"] == "TypeError" and "unexpected keyword argument" in failure["text"]:
        return (
            f"{message} Reward functions are called with prompts, completions, completion_ids, every dataset column, "
            "trainer_state, log_extra and log_metric: add **kwargs to its parameters for those it does not use."
        )
    return f"{message} Correct the function, or let it return None for completions that it cannot judge."


class FailureLog:
    """Logs the first failure of each function and then one in a hundred: a function that always fails says so often."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def note(self, failure: RewardFailure) -> None:
        """Count a failure of a function whose samples are dropped, and log it when it is its turn."""
        self._counts[failure.function] += 1
        count = self._counts[failure.function]
        if count % _SAY_EVERY == 1:
            logger.warning(
                "%s Samples without a reward are left out of training (reward_on_error='drop'). Failures of %r so far: "
                "%d; the next one is shown after %d more.",
                failure.message,
                failure.function,
                count,
                _SAY_EVERY,
            )
