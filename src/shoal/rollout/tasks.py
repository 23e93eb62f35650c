"""Run coroutines side by side so that none outlives the call."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
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
