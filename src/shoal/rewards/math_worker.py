"""The process that compares mathematical answers with math-verify, one JSON line in and one out.

It is a process because math-verify evaluates what a model wrote: `9^{9^{9^9}}` never ends, inside one C call that no
Python signal handler can interrupt, and math-verify's own time-outs work on the main thread only. Here the kernel's
timer ends the whole process instead, whatever it is doing. Started by its path, not as a module, so that it does not
import the rest of Shoal; it ends when its input does.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from typing import Any

_START_TIMEOUT_S = 120.0


def main(timeout_s: float) -> None:
    """Answer requests `{"gold": text, "answer": text}` until the input ends.

    Prints `{"ready": true}` once, then for each request first `{"gold": parsed or null}` and then
    `{"correct": bool, "answer": parsed or null}`; the second only when the gold answer could be parsed.

    Args:
        timeout_s: Longest time for either line of an answer; past it the process is killed by SIGALRM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's; this process ends with its input.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _START_TIMEOUT_S)
    # Both warn once that their own time-outs are off; they are, because the timer above replaces them.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    judge = _Judge()
    _say({"ready": True})
    signal.setitimer(signal.ITIMER_REAL, 0)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        gold = judge.parse_gold(request["gold"])
        _say({"gold": str(gold) if gold else None})
        if gold:
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            _say(judge.compare(gold, request["answer"]))
        signal.setitimer(signal.ITIMER_REAL, 0)


class _Judge:
    """Parses with the settings that TRL's `accuracy_reward` uses, so that rewards agree with it."""

    def __init__(self) -> None:
        # Imported here, under the timer, because it takes seconds on a busy machine.
        import math_verify  # type: ignore[import-untyped]
        from latex2sympy2_extended import NormalizationConfig  # type: ignore[import-untyped]

        self._library: Any = math_verify
        self._extraction = [
            math_verify.LatexExtractionConfig(
                normalization_config=NormalizationConfig(units=True),
                boxed_match_priority=0,  # what is \boxed is the answer, wherever it stands
                try_extract_without_anchor=False,
            )
        ]

    def parse_gold(self, text: str) -> list[Any]:
        """Return the gold answer's readings; empty when there is none."""
        readings: list[Any] = self._library.parse(text, parsing_timeout=None)
        return readings

    def compare(self, gold: list[Any], text: str) -> dict[str, Any]:
        """Return whether the completion's first answer equals the gold one."""
        answer = self._library.parse(
            text, extraction_config=self._extraction, extraction_mode="first_match", parsing_timeout=None
        )
        correct = bool(self._library.verify(gold, answer, timeout_seconds=None))
        return {"correct": correct, "answer": str(answer) if answer else None}


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
