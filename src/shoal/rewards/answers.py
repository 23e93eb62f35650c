"""Check what a reward function returned, and read it as one float per completion."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shoal.errors import RewardError

_LONGEST_SHOWN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRewards:
    """What a reward function answered.

    Attributes:
        values: `[K]` float64, NaN where it answered `None` and where its answer was no reward.
        faults: For each sample whose answer was no finite number and not `None`, what was wrong.
    """

    values: npt.NDArray[np.float64]
    faults: Mapping[int, str]


def read_rewards(answer: object, *, num_completions: int, who: str) -> ReadRewards:
    """Read a reward function's answer.

    Args:
        answer: A list, tuple or other sequence, a numpy array or a torch tensor, of numbers, booleans and `None`.
        num_completions: How many rewards there must be, K.
        who: The function and the dataset row, as messages are to name them.

    Raises:
        RewardError: It is something else, or has another length, so that no sample has a reward.
    """
    elements = _elements(answer, who=who)
    if len(elements) != num_completions:
        raise RewardError(
            f"{who} returned {len(elements)} rewards for {num_completions} completions: {shown(answer)}. Rewards are "
            "matched to completions by position, so there must be exactly one for each; use None for a completion that "
            "the function does not apply to."
        )
    values = np.full(num_completions, np.nan)
    faults: dict[int, str] = {}
    for index, element in enumerate(elements):
        if element is None:
            continue
        number = as_number(element)
        if number is None or not math.isfinite(number):
            faults[index] = _fault(element, number, index, who=who)
        else:
            values[index] = number
    return ReadRewards(values=values, faults=faults)


def shown(value: object) -> str:
    """Return a value's repr, cut to a length that fits a message."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}… ({len(text)} characters)"


def as_number(value: object) -> float | None:
    """Return a Python, numpy or torch scalar as a float, or None when it is not a number."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if value.ndim != 0:
            return None
        value = value.item()
    if isinstance(value, (numbers.Real, np.bool_)):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return None


def _elements(answer: object, *, who: str) -> Sequence[Any]:
    if isinstance(answer, (torch.Tensor, np.ndarray)):
        if answer.ndim != 1:
            raise RewardError(
                f"{who} returned an array of shape {tuple(answer.shape)}. One reward per completion is a flat array of "
                "shape (completions,): reduce it, for example with .squeeze(-1)."
            )
        values: list[Any] = answer.detach().cpu().tolist() if isinstance(answer, torch.Tensor) else answer.tolist()
        return values
    if isinstance(answer, Sequence) and not isinstance(answer, (str, bytes)):
        return answer
    if inspect.iscoroutine(answer):
        answer.close()
        hint = "Define it with `async def`, so that Shoal knows to await it."
    else:
        hint = "Return a list with one number per completion."
    raise RewardError(
        f"{who} returned {shown(answer)} ({type(answer).__name__}), which is not a list, tuple, numpy array or torch "
        f"tensor of rewards. {hint}"
    )


def _fault(element: object, number: float | None, index: int, *, who: str) -> str:
    """Say what is wrong with one sample's reward, of which `number` is the value if it has one."""
    if number is None:
        return (
            f"{who} returned {shown(element)} ({type(element).__name__}) for sample {index}, which is not a number. "
            "Return a float, an int, a bool, or None for a completion that the function does not apply to."
        )
    return (
        f"{who} returned {number} for sample {index}. Advantages compare the rewards of a group, and one that is "
        "not finite would spoil them all. Return None for a completion that the function does not apply to, and a "
        "finite number otherwise."
    )
