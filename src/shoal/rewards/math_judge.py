"""The trainer's end of the math-verify process: starts it when needed, and again after a time-out ended it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import RewardError

_WORKER = Path(__file__).with_name("math_worker.py")


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
        self._process: subprocess.Popen[str] | None = None

    def judge(self, *, gold: str, answer: str) -> Verdict:
        """Compare one completion's answer with the gold one.

        A gold answer that takes too long counts as unreadable, a completion that takes too long as wrong.

        Raises:
            RewardError: math-verify is not installed, or its process cannot start.
        """
        with self._lock:
            process = self._running_process()
            if not _send(process, {"gold": gold, "answer": answer}):
                process = self._restarted_process()
                _send(process, {"gold": gold, "answer": answer})
            first = _receive(process)
            if first is None:
                self._end()
                return Verdict(correct=None, gold="[timed out]", answer="[skipped]")
            if first["gold"] is None:
                return Verdict(correct=None, gold="[unparseable]", answer="[skipped]")
            second = _receive(process)
            if second is None:
                self._end()
                return Verdict(correct=False, gold=first["gold"], answer="[timed out]")
            return Verdict(correct=second["correct"], gold=first["gold"], answer=second["answer"] or "[unparseable]")

    def close(self) -> None:
        """End the process, if there is one; a later `judge` starts another."""
        with self._lock:
            self._end()

    def _running_process(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = self._start()
        return self._process

    def _restarted_process(self) -> subprocess.Popen[str]:
        self._end()
        return self._running_process()

    def _start(self) -> subprocess.Popen[str]:
        if importlib.util.find_spec("math_verify") is None:
            raise RewardError(
                "accuracy_reward compares answers with math-verify, which is not installed. Install it "
                "(`pip install math-verify[antlr4_13_2]`), or use a reward function of your own."
            )
        process = subprocess.Popen(
            # -P keeps this folder off the worker's import path, where its module names could hide others.
            [sys.executable, "-P", str(_WORKER), str(self._timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        # Bounded: the process sets its own timer before it imports anything slow.
        if _receive(process) is None:
            process.communicate()
            raise RewardError(
                f"The math-verify process of accuracy_reward ended with code {process.returncode} while it started, so "
                f"no answer can be compared. Run `{sys.executable} {_WORKER} 5` to see why."
            )
        return process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _send(process: subprocess.Popen[str], request: dict[str, str]) -> bool:
    """Write a request; False when the process is gone."""
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return False
    return True


def _receive(process: subprocess.Popen[str]) -> dict[str, Any] | None:
    """Read an answer; None when the process ended instead, which its timer makes it do."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.endswith("\n"):
        return None
    answer: dict[str, Any] = json.loads(line)
    return answer
