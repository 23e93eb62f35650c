"""What runs in the math-verify process: reading answers and comparing them. Loaded there by its path, nowhere else.

It is a process because math-verify evaluates what a model wrote: `9^{9^{9^9}}` never ends, inside one C call that no
Python signal handler can interrupt, and math-verify's own time-outs work on the main thread only.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import math_verify  # type: ignore[import-untyped]
from latex2sympy2_extended import NormalizationConfig  # type: ignore[import-untyped]

# With these settings TRL's `accuracy_reward` parses, so that rewards agree with it.
_EXTRACTION = [
    math_verify.LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,  # what is \boxed is the answer, wherever it stands
        try_extract_without_anchor=False,
    )
]
# Both warn once that their own time-outs are off; they are, because the trainer ends this process instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def read_gold(text: str) -> str | None:
    """Return a gold answer as it was read; None when there is none."""
    readings = _gold(text)
    return str(readings) if readings else None


def compare(gold: str, text: str) -> tuple[bool, str | None]:
    """Return whether a completion's first answer equals the gold one, and that answer as it was read."""
    answer = math_verify.parse(text, extraction_config=_EXTRACTION, extraction_mode="first_match", parsing_timeout=None)
    return bool(math_verify.verify(_gold(gold), answer, timeout_seconds=None)), str(answer) if answer else None


@functools.lru_cache(maxsize=8)  # a group's completions share theirs
def _gold(text: str) -> list[Any]:
    readings: list[Any] = math_verify.parse(text, parsing_timeout=None)
    return readings
