"""An event loop on a thread of its own, for synchronous code that needs asynchronous work done."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

_WAKE_S = 0.2
_END_S = 5.0


class LoopThread:
    """Owns an event loop and its thread; both end with `close`."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name=name)
        self._thread.start()

    def run(
        self, work: Coroutine[Any, Any, T], *, timeout_s: float, what: str, meanwhile: Callable[[], None] | None = None
    ) -> T:
        """Do `work` in the loop and wait for it. Interrupting the wait (Ctrl-C) cancels the work.

        Args:
            work: A coroutine.
            timeout_s: Longest wait.
            what: What is waited for, for the error.
            meanwhile: Called on this thread several times a second while the work goes on. The time that it takes does
                not count, and what it raises ends the work.

        Raises:
            TimeoutError: It took longer.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        waited = 0.0
        try:
            while True:
                try:
                    # In short waits, because a signal is handled only between them on some platforms.
                    return future.result(timeout=_WAKE_S)
                except concurrent.futures.TimeoutError:
                    if future.done():
                        return future.result()
                    waited += _WAKE_S
                    if waited >= timeout_s:
                        raise TimeoutError(f"waited {timeout_s:g} s for {what}") from None
                if meanwhile is not None:
                    meanwhile()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what still runs, stop the loop and wait for its thread. Calling it again does nothing."""
        if not self._thread.is_alive():
            return
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(timeout=_END_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_END_S)
        if not self._thread.is_alive():
            self._loop.close()


async def _cancel_others() -> None:
    """Cancel every other task of the running loop and wait until each has cleaned up."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
