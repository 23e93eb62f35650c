"""Blocking calls that need not be waited for to their end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class AbandonableCall(Generic[T]):
    """A blocking call on a daemon thread, which is left behind if it takes too long.

    What waits for a partner that died within NCCL or Gloo cannot be interrupted from Python.

    Args:
        function: What to call; starts at once.
        name: Of the thread.
    """

    def __init__(self, function: Callable[[], T], name: str) -> None:
        self._function = function
        self._error: BaseException | None = None
        self._value: T
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True, name=name).start()

    def ends_within(self, timeout_s: float) -> bool:
        """Wait for its end, for so long at most; return whether it has come."""
        return self._ended.wait(max(0.0, timeout_s))

    def result(self) -> T:
        """Block until it ends; return its value, or raise what it raised."""
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error
        finally:
            del self._function  # and what it holds: a group's connections close with the last reference
            self._ended.set()
