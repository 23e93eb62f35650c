"""The trainer's hold on its engines: what is started, met and published when, and what becomes of one that is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from shoal.engines.fleet import Fleet, ManagedEngine
from shoal.errors import EngineError, WeightSyncError
from shoal.observe.ledger import TimeLedger
from shoal.rollout.dispatch import DispatchSettings
from shoal.rollout.pool import PoolSettings
from shoal.testing import FakeEngine
from shoal.testing.ranks import ThreadRanks, on_ranks
from shoal.trainer.engine_side import EngineSide
from shoal.trainer.rollouts import Rollouts, RolloutSettings
from shoal.types import PublishReport


class Process:
    """Stands in for an engine's process."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.num_asked = 0
        self.log_path = "engine.log"
        self.num_workers = 1
        self.has_plugin = True

    def exit_status(self) -> int | None:
        return self.status

    def why_it_died(self) -> str:
        return "no reason"

    def ask_to_end(self) -> None:
        self.num_asked += 1
        self.status = self.status or -15

    def wait_ended(self) -> None: ...


class Client(FakeEngine):
    url = "http://127.0.0.1:8000"

    async def aclose(self) -> None: ...

    def close(self) -> None: ...


def fleet_of(num_engines: int) -> Fleet:
    return Fleet(
        [
            ManagedEngine(process=cast(Any, Process()), client=cast(Any, Client(f"engine-{i}")))
            for i in range(num_engines)
        ]
    )


def rollouts_of(fleet: Fleet) -> Rollouts:
    pool = PoolSettings(dispatch=DispatchSettings(max_in_flight=4, affinity_margin=3), stall_s=30.0)
    settings = RolloutSettings(backends=("gloo",) * len(fleet.engines), pool=pool)
    return Rollouts(fleet, decode=cast(Any, None), score=cast(Any, None), settings=settings)


def report(version: int, **lost: str) -> PublishReport:
    lost = {name.replace("_", "-"): why for name, why in lost.items()}
    return PublishReport(version=version, num_workers=1, num_digests=0, num_bytes=0, lost=lost, seconds=0.0)


def processes(fleet: Fleet) -> list[Process]:
    return [cast(Process, engine.process) for engine in fleet.engines]


# ---- fleets ----


def test_an_engine_that_was_ended_is_no_death_and_the_others_run_on() -> None:
    fleet = fleet_of(3)
    fleet.end("engine-1")
    assert [process.num_asked for process in processes(fleet)] == [0, 1, 0]
    fleet.check_alive()
    processes(fleet)[2].status = 9
    with pytest.raises(EngineError, match=r"engine-2 ended with status 9: no reason \(see engine\.log\)"):
        fleet.check_alive()


# ---- rollouts ----


def test_an_engine_that_a_publish_has_lost_is_ended_and_asked_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    fleet = fleet_of(2)
    rollouts = rollouts_of(fleet)
    assert [address.client.name for address in rollouts.addresses] == ["engine-0", "engine-1"]
    rollouts.publishing(1)
    rollouts.take(report(1))
    assert rollouts.version == 1 and [process.num_asked for process in processes(fleet)] == [0, 0]
    rollouts.publishing(2)
    rollouts.take(report(2, engine_0="it stalled"))
    assert rollouts.version == 2 and [process.num_asked for process in processes(fleet)] == [1, 0]
    assert "engine-0 is ended, the run goes on with the other engines: it stalled" in caplog.text
    rollouts.check_alive()
    assert asyncio.run(_homes(rollouts)) == {"engine-1"}
    rollouts.close()


async def _homes(rollouts: Rollouts) -> set[str]:
    from shoal.types import RolloutRequest, SamplingSettings

    sampling = SamplingSettings(temperature=1.0, max_tokens=3, stop_token_ids=())
    requests = [RolloutRequest(prompt_token_ids=(1,), seed=seed, sampling=sampling) for seed in range(6)]
    return {rollout.engine for rollout in await rollouts._pool.generate_group(requests)}


# ---- every rank ----


class Publisher:
    """Notes what is asked of it."""

    plans = ()

    def __init__(self, events: list[str], fails_at: set[str]) -> None:
        self._events = events
        self._fails_at = fails_at

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def note(*arguments: Any) -> Any:
            self._events.append(" ".join(map(str, (name, *arguments))))
            if name in self._fails_at:
                raise WeightSyncError(f"{name} fails")
            return report(*arguments) if name == "publish" else None

        return note


class Side:
    """An `EngineSide` whose every part notes that it is called."""

    def __init__(self, ranks: ThreadRanks) -> None:
        self.events: list[str] = []
        self.fails_at: set[str] = set()
        self.fleet = fleet_of(1)
        self.real = EngineSide(
            ranks=ranks,
            ledger=TimeLedger(),
            make_sources=lambda: cast(Any, self.events.append("sources")) or {},
            start=self._start,
            make_publisher=lambda sources, rollouts: cast(Any, Publisher(self.events, self.fails_at)),
        )

    def _start(self) -> Rollouts:
        self.events.append("start")
        return rollouts_of(self.fleet)


def test_engines_are_published_to_when_they_hold_something_else_and_only_then() -> None:
    def run(ranks: ThreadRanks) -> list[str]:
        side = Side(ranks)
        assert side.real.refresh(3, always=False) is not None
        assert side.real.refresh(3, always=False) is None
        assert side.real.refresh(3, always=True) is not None
        side.real.forget()
        assert side.real.refresh(3, always=False) is not None
        side.real.publish(4)
        assert side.real.refresh(4, always=False) is None
        side.real.close()
        assert side.real.refresh(4, always=False) is not None
        side.real.close()
        return side.events

    first, second = on_ranks(2, run)
    published = ["publish 3", "publish 3", "publish 3", "publish 4", "close"]
    assert first == ["sources", "start", "connect", *published, "sources", "start", "connect", "publish 4", "close"]
    assert second == [event for event in cast(list[str], first) if event != "start"]


def test_a_dead_process_explains_a_failed_publish() -> None:
    def run(ranks: ThreadRanks) -> None:
        side = Side(ranks)
        side.real.publish(1)
        side.fails_at.add("publish")
        with pytest.raises(WeightSyncError, match="publish fails"):
            side.real.publish(2)
        processes(side.fleet)[0].status = 1
        with pytest.raises(EngineError, match="engine-0 ended with status 1"):
            side.real.publish(2)
        side.real.close()

    assert on_ranks(1, run) == [None]


def test_a_meeting_that_failed_is_tried_again_before_anything_is_published() -> None:
    def run(ranks: ThreadRanks) -> list[str]:
        side = Side(ranks)
        side.fails_at.add("connect")
        with pytest.raises(WeightSyncError, match="connect fails"):
            side.real.publish(1)
        side.fails_at.clear()
        side.real.publish(1)
        side.real.close()
        return side.events

    (events,) = on_ranks(1, run)
    assert isinstance(events, list) and events.count("connect") == 2 and events[-2:] == ["publish 1", "close"]
