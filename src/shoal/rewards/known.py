"""Well-known rewards, ready to be passed as `reward_funcs`; they agree with TRL's of the same names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.errors import ConfigError
from shoal.rewards.math_judge import MathJudge
from shoal.types import CompletionLike


def accuracy_reward(
    completions: Sequence[CompletionLike],
    solution: Sequence[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Give 1.0 to completions whose mathematical answer equals the dataset's `solution` column, else 0.0.

    math-verify reads both, so `\\frac{1}{2}` equals `0.5`. The answer must be in `\\boxed{...}`, or follow
    words such as "the final answer is" as LaTeX. The comparison runs in another process under a time limit of 5 s, past
    which a completion is wrong.

    Args:
        completions: K completions, as text or as a list of one message.
        solution: The K gold answers.
        log_extra: Given by the trainer; gets the columns `solution`, `gold_parsed` and `answer_parsed`.
        **kwargs: Other columns and arguments, not used.

    Returns:
        One reward per completion; `None` where the gold answer cannot be read, which leaves the completion out.

    Raises:
        RewardError: math-verify is not installed.
    """
    judge = _math_judge()
    verdicts = [
        judge.judge(gold=gold, answer=text_of(completion))
        for gold, completion in zip(solution, completions, strict=True)
    ]
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("gold_parsed", [verdict.gold for verdict in verdicts])
        log_extra("answer_parsed", [verdict.answer for verdict in verdicts])
    return [None if verdict.correct is None else float(verdict.correct) for verdict in verdicts]


def think_format_reward(completions: Sequence[CompletionLike], **kwargs: Any) -> list[float]:
    """Give 1.0 to completions that begin with one `<think>` block and close it, else 0.0.

    Args:
        completions: K completions, as text or as a list of one message.
        **kwargs: Columns and arguments, not used.

    Returns:
        One reward per completion.
    """
    return [float(_is_one_think_block(text_of(completion))) for completion in completions]


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable[..., list[float]]:
    """Make a reward that punishes completions near the length limit: equation 13 of DAPO (arXiv:2503.14476).

    It is 0 up to `max_completion_len - soft_punish_cache` tokens, falls linearly to -1 at `max_completion_len`, and
    stays there.

    Args:
        max_completion_len: Length from which on the punishment is full, in tokens.
        soft_punish_cache: Over how many tokens before that it grows; 0 for a step.

    Raises:
        ConfigError: Not `0 <= soft_punish_cache <= max_completion_len`.
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ConfigError(
            f"soft_punish_cache={soft_punish_cache} does not lie between 0 and max_completion_len={max_completion_len},"
            " so the punishment would begin at a negative length or never. Set it to a part of max_completion_len, "
            f"such as {max(max_completion_len // 5, 0)}."
        )
    return _SoftOverlongPunishment(max_length=max_completion_len, ramp=soft_punish_cache)


def text_of(completion: CompletionLike) -> str:
    """Return a completion's text; a conversation's is the content of its last message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    return content if isinstance(content, str) else ""


@dataclass(frozen=True, kw_only=True)
class _SoftOverlongPunishment:
    """A callable record rather than a closure, so that it can be pickled. Lengths in tokens."""

    max_length: int
    ramp: int
    __name__ = "soft_overlong_punishment_reward"  # not annotated: a field of this name would rename the class

    def __call__(self, completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
        return [self._punishment(len(token_ids)) for token_ids in completion_ids]

    def _punishment(self, length: int) -> float:
        over = length - (self.max_length - self.ramp)
        if over <= 0:
            return 0.0
        return -1.0 if over >= self.ramp else -over / self.ramp


def _is_one_think_block(text: str) -> bool:
    opening = "<think>"
    if not text.startswith(opening):
        return False
    rest = text[len(opening) :]
    return opening not in rest and "</think>" in rest


@functools.lru_cache(maxsize=1)
def _math_judge() -> MathJudge:
    """Return the one judge of this process: its worker takes a second to start, so calls share it."""
    return MathJudge()
