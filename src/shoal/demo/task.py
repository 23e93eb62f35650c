"""The demo's task: small sums and products, from reasoning-gym, answered within a few tokens.

SmolLM2-135M-Instruct answers about one in ten at first: it starts to explain and runs out of room, or is wrong. How the
task was chosen, with figures, is in docs/decisions/0004-the-demo-task.md.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import reasoning_gym
from datasets import Dataset

TASK = "basic_arithmetic (reasoning-gym): two numbers up to 10 with +, - or *, answered in at most 10 tokens"
NUM_HELD_OUT = 150
MAX_COMPLETION_LENGTH = 10

# One draw of the generator: all of the 363 questions that there are turn up in it.
_NUM_DRAWN = 6000
_SEED = 0
_CONFIG: dict[str, Any] = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 1,
    "operators": ["+", "-", "*"],
    "allow_parentheses": False,
}
_INTEGER = re.compile(r"-?\d+")


def training_dataset() -> Dataset:
    """Return every question that is not held out, once."""
    return _as_dataset(_questions()[NUM_HELD_OUT:])


def held_out_dataset(num_questions: int = NUM_HELD_OUT) -> Dataset:
    """Return questions that are never trained on, the same ones in every run.

    Args:
        num_questions: At most `NUM_HELD_OUT`.
    """
    return _as_dataset(_questions()[: min(num_questions, NUM_HELD_OUT)])


def is_correct(completions: list[str], entry: list[int], **_: Any) -> list[float]:
    """Reward 1 for a completion whose last integer is the right answer, by reasoning-gym's own verdict, else 0.

    Args:
        completions: The model's texts.
        entry: For each, the position of its question among reasoning-gym's.
    """
    return [_score(last_integer(text), position) for text, position in zip(completions, entry, strict=True)]


def last_integer(text: str) -> str | None:
    """Return the last integer in a text, as it is written: "3 * 4 = 12" answers 12."""
    found = _INTEGER.findall(text)
    return found[-1] if found else None


def _score(answer: str | None, position: int) -> float:
    dataset = _dataset()
    return 1.0 if dataset.score_answer(answer, dataset[position]) == 1.0 else 0.0


@functools.cache
def _dataset() -> Any:
    return reasoning_gym.create_dataset("basic_arithmetic", size=_NUM_DRAWN, seed=_SEED, **_CONFIG)


@functools.cache
def _questions() -> list[int]:
    """Return the position of the first occurrence of each question; reasoning-gym drew them in random order."""
    first: dict[str, int] = {}
    for position in range(_NUM_DRAWN):
        first.setdefault(_dataset()[position]["question"], position)
    return list(first.values())


def _as_dataset(positions: list[int]) -> Dataset:
    return Dataset.from_list(
        [{"prompt": _prompt(_dataset()[position]["question"]), "entry": position} for position in positions]
    )


def _prompt(question: str) -> str:
    """Return the question in SmolLM2's chat format, without the system prompt that its template adds.

    The system prompt is longer than the question; without it a step trains on half as many tokens.
    """
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
