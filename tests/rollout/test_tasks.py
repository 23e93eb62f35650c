"""Tasks end with whoever wanted them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from shoal.rollout.tasks import SharedTasks, gather_or_cancel


def running() -> int:
    """Tasks beside the test's own."""
    return len(asyncio.all_tasks()) - 1


async def forever() -> None:
    await asyncio.Event().wait()


async def fail() -> None:
    raise ValueError("no more")


def test_when_one_of_a_group_fails_the_others_have_ended_by_the_time_it_is_known() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="no more"):
            await gather_or_cancel([forever(), fail(), forever()])
        assert running() == 0

    asyncio.run(main())


def test_shared_tasks_run_once_from_the_first_who_wants_them_to_the_last() -> None:
    made: list[int] = []

    def make() -> list[Coroutine[Any, Any, None]]:
        made.append(running())
        return [forever(), forever()]

    async def main() -> None:
        tasks = SharedTasks(make)
        for _ in range(2):
            first, second = tasks.running(), tasks.running()
            await first.__aenter__()
            await second.__aenter__()
            assert running() == 2
            await first.__aexit__(None, None, None)
            assert running() == 2
            await second.__aexit__(None, None, None)
            assert running() == 0
        assert made == [0, 0]

    asyncio.run(main())


def test_whoever_leaves_shared_tasks_last_is_told_what_failed() -> None:
    async def main() -> None:
        tasks = SharedTasks(lambda: [forever(), fail()])
        with pytest.raises(ValueError, match="no more"):
            async with tasks.running():
                async with tasks.running():
                    await asyncio.sleep(0)
        assert running() == 0

    asyncio.run(main())
