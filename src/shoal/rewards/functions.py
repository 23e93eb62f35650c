"""Turn what a user passes as `reward_funcs` into a tuple of named reward functions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shoal.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """One reward function, with the name under which its rewards are reported.

    Attributes:
        name: Distinct from the names of all other functions of the run.
        function: The user's callable; keyword arguments in, one reward per completion out.
        is_async: Whether calling it gives a coroutine.
    """

    name: str
    function: Callable[..., Any]
    is_async: bool


def normalise_reward_funcs(reward_funcs: object) -> tuple[RewardFunction, ...]:
    """Return the user's `reward_funcs`, one callable or a list of them, as named functions.

    The name is `__name__`, or the class's name for a callable object; a `functools.partial` is named after the function
    inside. The second function of the same name gets `_2`, the third `_3`.

    Raises:
        ConfigError: There is none, or one of them is not a callable that Shoal can call.
    """
    if isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str):
        functions = list(reward_funcs)
    else:
        functions = [reward_funcs]
    if not functions:
        raise ConfigError(
            "reward_funcs is empty, so nothing says which completions are good. Pass at least one function that takes "
            "`completions` and returns one number per completion."
        )
    for position, function in enumerate(functions):
        _refuse_uncallable(function, where="reward_funcs" if len(functions) == 1 else f"reward_funcs[{position}]")
    names = _distinct([_name_of(function) for function in functions])
    return tuple(
        RewardFunction(name=name, function=function, is_async=_is_async(function))
        for name, function in zip(names, functions, strict=True)
    )


def _refuse_uncallable(function: object, *, where: str) -> None:
    """Raise a `ConfigError` for anything that is not a reward function."""
    if isinstance(function, str):
        raise ConfigError(
            f"{where}={function!r} names a reward model, and Shoal does not load reward models yet. Load it yourself "
            "and pass a function `def reward(prompts, completions, **kwargs)` that returns its scores as a list."
        )
    if isinstance(function, torch.nn.Module):
        raise ConfigError(
            f"{where} is a {type(function).__name__} (a torch.nn.Module), and Shoal does not tokenize for reward models"
            " yet. Wrap it in a function `def reward(prompts, completions, **kwargs)` that tokenizes the texts, runs "
            "the model and returns its scores as a list."
        )
    if inspect.isclass(function):
        raise ConfigError(
            f"{where} is the class {function.__name__}, not an object: calling it would make an instance instead of "
            f"rewards. Pass an instance, {function.__name__}(...)."
        )
    if not callable(function):
        raise ConfigError(
            f"{where} is {function!r} ({type(function).__name__}), which cannot be called. Pass a function that takes "
            "`prompts`, `completions` and **kwargs, and returns one number per completion."
        )


def _unwrapped(function: Any) -> Any:
    """Return the function inside any number of `functools.partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name_of(function: Any) -> str:
    inner = _unwrapped(function)
    name = getattr(inner, "__name__", None)
    return name if isinstance(name, str) and name else type(inner).__name__


def _is_async(function: Any) -> bool:
    """Tell whether calling gives a coroutine; an object with `async def __call__` counts too."""
    inner = _unwrapped(function)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def _distinct(names: list[str]) -> list[str]:
    """Number repeated names, never inventing one that another function already has."""
    taken = set(names)
    seen: set[str] = set()
    result = []
    for name in names:
        candidate, number = name, 2
        while candidate in seen or (candidate != name and candidate in taken):
            candidate, number = f"{name}_{number}", number + 1
        seen.add(candidate)
        result.append(candidate)
    return result
