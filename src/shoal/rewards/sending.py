"""Make reward functions and their arguments into bytes that a worker process can turn back."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.errors import ConfigError, RewardError
from shoal.rewards.functions import RewardFunction
from shoal.rewards.worker_process import Setup

_MOST_HISTORY = 100
_WAY_OUT = (
    "Define it at the top level of a module that can be imported, with whatever cannot be copied (locks, connections, "
    "models) made inside of it; or set reward_workers=0, which calls it on a thread of the trainer."
)


def setup_of(functions: Sequence[RewardFunction]) -> Setup:
    """Return what a worker needs to have these functions.

    A function of a module goes by its name, so the worker imports that module. One that was defined in the script
    itself, in a notebook or inside another function goes whole, with the values that it uses. In both cases a worker
    has its own copy: what a call changes there, neither the trainer nor another worker sees.

    Raises:
        ConfigError: One cannot be copied; the message says why, and what to do.
    """
    import cloudpickle  # type: ignore[import-untyped]  # takes a moment, and most runs have no workers

    for function in functions:
        try:
            pickle.loads(cloudpickle.dumps(function.function))
        except Exception as error:
            raise ConfigError(
                f"Reward function {function.name!r} cannot be sent to a worker process: {type(error).__name__}: "
                f"{_first_line(error)}. {_WAY_OUT}"
            ) from error
    return {
        "path": list(sys.path),
        "pickled": cloudpickle.dumps([function.function for function in functions]),
        "file": "",
        "names": [],
    }


def not_received(functions: Sequence[RewardFunction], error: RewardError) -> ConfigError:
    """Return the error for workers that could not make the functions anew."""
    names = ", ".join(repr(function.name) for function in functions)
    refused = ConfigError(
        f"A worker process could not load the reward functions ({names}): {error}. A worker imports the modules that "
        f"they come from anew, from the same folders as the trainer. {_WAY_OUT}"
    )
    for note in getattr(error, "__notes__", ()):
        refused.add_note(note)
    return refused


def pickle_keywords(keywords: Mapping[str, Any], *, who: str) -> bytes:
    """Return a call's arguments as bytes.

    Args:
        keywords: Without the functions that log; those are made where they are called.
        who: The function and the dataset row, as messages are to name them.

    Raises:
        RewardError: One cannot be copied; the message names it.
    """
    try:
        return pickle.dumps(dict(keywords), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        culprits = [name for name, value in keywords.items() if not _can_be_pickled(value)]
        raise RewardError(
            f"{who} cannot be called in a worker process, because its argument {', '.join(culprits)} cannot be copied "
            f"there ({type(error).__name__}: {_first_line(error)}). Change the dataset's column to plain data, or set "
            "reward_workers=0."
        ) from error


def plain_state(trainer_state: object) -> object:
    """Return the trainer's state as bare attributes; for its own class each worker would import transformers.

    Of a long `log_history` the end goes: all of 10,000 steps is 8 MiB, which would be copied for each group.
    """
    if not hasattr(trainer_state, "__dict__"):
        return trainer_state
    attributes = dict(vars(trainer_state))
    if isinstance(history := attributes.get("log_history"), list):
        attributes["log_history"] = history[-_MOST_HISTORY:]
    return types.SimpleNamespace(**attributes)


def _can_be_pickled(value: object) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
