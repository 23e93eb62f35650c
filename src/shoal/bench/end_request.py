"""Taking note of a request to end, so that what runs is ended in good order and what was found is kept."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from shoal.bench.children import StageError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class EndRequest:
    """Takes note of SIGTERM and SIGINT while it is entered. Use as a context manager, on the main thread.

    Attributes:
        reason: Which came first, in words; None before.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}

    def raise_if_told(self) -> None:
        """Raise if a signal has come.

        Raises:
            StageError: One has.
        """
        if self.reason is not None:
            raise StageError(self.reason)

    def __enter__(self) -> EndRequest:
        for number in _SIGNALS:
            signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # Noted, not raised: `timeout` sends it twice, and ending the processes must not be interrupted.
        self.reason = self.reason or f"the benchmark was told to end ({signal.Signals(number).name})"
