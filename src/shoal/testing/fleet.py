"""A fleet of engines that have no processes: they die, stall and come back as a test wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from shoal.engines.fleet import Fleet, ManagedEngine
from shoal.errors import EngineFaultError, EngineStartError
from shoal.testing.engines import FakeEngine
from shoal.types import EngineReport, Rollout, RolloutRequest


class FakeProcess:
    """Stands in for an engine's process.

    Args:
        name: Of the engine.
        life: How many processes the engine has had before.
    """

    def __init__(self, name: str, life: int = 0) -> None:
        self.name = name
        self.life = life
        self.status: int | None = None
        self.num_asked = 0
        self.log_path = Path(f"{name}.{life}.log")
        self.spec = SimpleNamespace(num_workers=1, sleeps=False)
        self.num_workers = 1
        self.has_plugin = True
        self.num_starts = 0
        self.may_start: Callable[[int], bool] = lambda number: True
        """Whether the engine's n-th restart succeeds."""
        self.following: FakeProcess | None = None
        """What took its place."""

    def exit_status(self) -> int | None:
        """Return what the test has set."""
        return self.status

    def why_it_died(self) -> str:
        """Say nothing."""
        return "no reason"

    def stage(self) -> str:
        """Say nothing."""
        return "starting"

    def ask_to_end(self) -> None:
        """End at once, unless it has."""
        self.num_asked += 1
        self.status = self.status or -15

    def wait_ended(self) -> None:
        """It has ended."""

    def start_again(self) -> tuple[FakeProcess, str]:
        """Begin the next life.

        Raises:
            EngineStartError: The test does not want it to start.
        """
        self.ask_to_end()
        self.num_starts += 1
        if not self.may_start(self.num_starts):
            raise EngineStartError(f"{self.name} was told not to start")
        self.following = FakeProcess(self.name, self.life + 1)
        self.following.may_start = self.may_start
        self.following.num_starts = self.num_starts
        return self.following, f"http://{self.name}/{self.following.life}"


class FakeClient(FakeEngine):
    """Stands in for an engine's client: a `FakeEngine` that fails everything once its process is gone.

    Args:
        process: The engine's.
        url: Where it would be.
        delay_s: See `FakeEngine`; of the first life. Those that follow answer at once.
    """

    def __init__(self, process: FakeProcess, url: str, delay_s: Callable[[int], float] = lambda seed: 0.0) -> None:
        super().__init__(process.name, delay_s=delay_s)
        self.process = process
        self.url = url
        self.cache_salt = ""
        self.is_closed = False

    def is_healthy(self) -> bool:
        """Whether its process lives."""
        return self.process.status is None

    def for_next_life(self, url: str, log_path: Path | None) -> FakeClient:
        """Return the next process's."""
        assert self.process.following is not None
        return FakeClient(self.process.following, url)

    async def generate(self, request: RolloutRequest) -> Rollout:
        """Write, if there is a process."""
        self._check()
        return await super().generate(request)

    async def report(self) -> EngineReport:
        """Report, if there is a process."""
        self._check()
        return await super().report()

    async def aclose(self) -> None:
        """Take note."""
        self.is_closed = True

    def close(self) -> None:
        """Nothing is open."""

    def _check(self) -> None:
        if self.process.status is not None:
            raise EngineFaultError(f"{self.name} is gone")


def fake_fleet(num_engines: int, delay_s: Callable[[int], float] = lambda seed: 0.0) -> Fleet:
    """Return a real `Fleet` of such engines, `engine-0` and so on.

    Args:
        num_engines: How many.
        delay_s: Seconds that a request takes, from its seed; in the engines' first lives.
    """
    processes = [FakeProcess(f"engine-{index}") for index in range(num_engines)]
    return Fleet(
        [
            ManagedEngine(process=cast(Any, process), client=cast(Any, FakeClient(process, "http://first", delay_s)))
            for process in processes
        ]
    )


def fake_processes(fleet: Fleet) -> list[FakeProcess]:
    """Return the present processes of a `fake_fleet`."""
    return [cast(FakeProcess, engine.process) for engine in fleet.engines]
