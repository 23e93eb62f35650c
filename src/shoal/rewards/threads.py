"""Run blocking functions on daemon threads, under a time-out that the waiting side can rely on.

`asyncio.to_thread` does not serve here: a function that never returns would keep one of its pool's threads for ever,
and the interpreter waits for those threads at exit. A Python thread cannot be killed, so after a time-out it is left
behind as a daemon, which does not keep the process alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a call gave: a value, or the exception it raised.

    Attributes:
        value: What was returned; None when something was raised.
        error: What was raised, `SystemExit` and the like included; None when the call returned.
    """

    value: Any
    error: BaseException | None


async def run_in_daemon_thread(call: Callable[[], Any], *, timeout_s: float, name: str) -> Outcome:
    """Run `call` on a thread of its own and wait for it.

    The exception is part of the outcome rather than raised, because a future refuses some of them (`StopIteration`)
    and the event loop treats others as its own (`SystemExit`).

    Args:
        call: What to run; it sees a copy of the caller's context variables.
        timeout_s: How long to wait, in seconds.
        name: The thread's name, for whoever looks at a stack dump.

    Raises:
        TimeoutError: `call` is still running after `timeout_s`. Its thread is left behind.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Outcome] = loop.create_future()
    context = contextvars.copy_context()

    def deliver(outcome: Outcome) -> None:
        if not done.done():
            done.set_result(outcome)

    def work() -> None:
        try:
            outcome = Outcome(value=context.run(call), error=None)
        except BaseException as error:
            outcome = Outcome(value=None, error=error)
        # The loop is closed when a call that was given up on returns after the end of training: nobody waits for it.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, outcome)

    threading.Thread(target=work, name=name, daemon=True).start()
    # Not `wait_for`: that of Python 3.11 swallows a cancellation that comes in the moment of the answer.
    async with asyncio.timeout(timeout_s):
        return await done
