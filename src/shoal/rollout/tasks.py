"""Run coroutines side by side so that none outlives its owner: a call, or those who hold a context open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


async def gather_or_cancel(work: Iterable[Coroutine[Any, Any, T]]) -> tuple[T, ...]:
    """Return all results in order; when one fails, or the caller is cancelled, cancel the others and wait for them."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        return tuple(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class SharedTasks:
    """Tasks without an end, which run for as long as anybody wants them.

    Args:
        make: Makes the coroutines; called each time that somebody wants them and nobody did.
    """

    def __init__(self, make: Callable[[], Iterable[Coroutine[Any, Any, None]]]) -> None:
        self._make = make
        self._num_users = 0
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Have them run, at least for as long as the context lasts.

        Raises:
            Exception: One has failed meanwhile; whoever leaves last is told.
        """
        self._num_users += 1
        if self._num_users == 1:
            self._tasks = [asyncio.create_task(coroutine) for coroutine in self._make()]
        try:
            yield
        finally:
            self._num_users -= 1
            if self._num_users == 0:
                tasks, self._tasks = self._tasks, []
                for task in tasks:
                    task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
                for error in (end for end in ends if isinstance(end, Exception)):
                    raise error
