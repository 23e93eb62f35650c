"""The trainer's end of the math-verify process: starts it when needed, and again after a time-out ended it."""

from __future__ import annotations

import importlib.util
import pickle
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import RewardError
from shoal.rewards.worker_process import Reply
from shoal.rewards.workers import Worker, WorkerEndedError, WorkerLauncher

_FUNCTIONS = Path(__file__).with_name("math_functions.py")
_READ_GOLD, _COMPARE = 0, 1  # their places among the names below
_NO_KEYWORDS = pickle.dumps({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What math-verify says about one completion.

    Attributes:
        correct: Whether the answer equals the gold one; None when the gold one could not be read.
        gold: The gold answer as it was read, or why it was not.
        answer: The completion's answer as it was read, or why it was not.
    """

    correct: bool | None
    gold: str
    answer: str


class MathJudge:
    """Compares answers in a process of its own, which a time-out can end; safe to use from several threads."""

    def __init__(self, *, timeout_s: float = 5.0) -> None:
        """Start nothing yet.

        Args:
            timeout_s: Longest time to read one gold answer, and to read and compare one completion, in seconds.
        """
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._launcher = WorkerLauncher(
            {"path": list(sys.path), "pickled": b"", "file": str(_FUNCTIONS), "names": ["read_gold", "compare"]},
            is_quiet=True,
        )
        self._worker: Worker | None = None

    def judge(self, *, gold: str, answer: str) -> Verdict:
        """Compare one completion's answer with the gold one.

        A gold answer that takes too long counts as unreadable, a completion that takes too long as wrong.

        Raises:
            RewardError: math-verify is not installed, or its process cannot start.
        """
        with self._lock:
            read = self._ask(_READ_GOLD, gold)
            if read is None:
                return Verdict(correct=None, gold="[timed out]", answer="[skipped]")
            if read["value"] is None:
                return Verdict(correct=None, gold="[unparseable]", answer="[skipped]")
            compared = self._ask(_COMPARE, gold, answer)
            if compared is None:
                return Verdict(correct=False, gold=read["value"], answer="[timed out]")
            correct, parsed = compared["value"] or (False, None)
            return Verdict(correct=correct, gold=read["value"], answer=parsed or "[unparseable]")

    def close(self) -> None:
        """End the process, if there is one; a later `judge` starts another."""
        with self._lock:
            self._launcher.close()

    @property
    def pid(self) -> int | None:
        """Process id of math-verify's process; None before the first comparison."""
        return self._worker.pid if self._worker is not None else None

    def _ask(self, function: int, *arguments: str) -> Reply | None:
        """Return what a function of the process answers; None when the process had to be ended, or ended itself."""
        if self._worker is None or not self._worker.is_running():
            self._worker = self._launch()
        try:
            return self._worker.call(
                {"function": function, "arguments": arguments, "keywords": _NO_KEYWORDS, "logs": False},
                timeout_s=self._timeout_s,
            )
        except (TimeoutError, WorkerEndedError):
            return None

    def _launch(self) -> Worker:
        if importlib.util.find_spec("math_verify") is None:
            raise RewardError(
                "accuracy_reward compares answers with math-verify, which is not installed. Install it "
                "(`pip install math-verify[antlr4_13_2]`), or use a reward function of your own."
            )
        try:
            return self._launcher.launch()
        except RewardError as error:
            raise RewardError(
                f"The math-verify process of accuracy_reward did not start, so no answer can be compared: {error}. "
                'See whether `python -c "import math_verify"` works.'
            ) from error
