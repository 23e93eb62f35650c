"""Engines that are lost and come back: who is asked, restarted, refilled and waited for, on all ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest

from shoal.engines.fleet import Fleet
from shoal.engines.restarts import RestartSettings
from shoal.errors import EnginesLostError, NoEngineError, RewardError, WeightSyncError
from shoal.observe.ledger import TimeLedger
from shoal.rollout.collector import GroupRequest
from shoal.rollout.dispatch import DispatchSettings
from shoal.rollout.health import State
from shoal.rollout.pool import PoolSettings
from shoal.testing.fleet import FakeClient, FakeProcess, fake_fleet, fake_processes
from shoal.testing.ranks import ThreadRanks, on_ranks
from shoal.trainer.comebacks import Comebacks
from shoal.trainer.engine_side import EngineSide
from shoal.trainer.rollouts import Rollouts, RolloutSettings
from shoal.types import Prompt, PublishReport, Rollout, SamplingSettings, ScoredGroup

WAIT_S = 30.0
NEVER_S = 600.0
SAMPLING = SamplingSettings(temperature=1.0, max_tokens=9, stop_token_ids=())


class Publisher:
    """Notes what is asked of it, and keeps the names of those that it publishes to."""

    plans = ()

    def __init__(self, names: list[str]) -> None:
        self.live_engines = tuple(names)
        self.events: list[str] = []
        self.fails: dict[str, list[Exception]] = {}
        """What the next calls of a method raise, one after the other."""

    def connect(self) -> None:
        self._note("connect")

    def close(self) -> None: ...

    def leave(self, names: list[str]) -> None:
        self._note("leave", *names)
        self.live_engines = tuple(name for name in self.live_engines if name not in names)

    def admit(self, name: str, address: Any) -> None:
        self._note("admit", name)
        self.live_engines = tuple(sorted({*self.live_engines, name}))

    def refill(self, name: str, address: Any, version: int) -> None:
        self._note("refill", name, version)
        self.live_engines = tuple(sorted({*self.live_engines, name}))

    def publish(self, version: int) -> PublishReport:
        try:
            self._note("publish", version, *self.live_engines)
        except EnginesLostError:
            self.live_engines = ()
            raise
        return PublishReport(version=version, num_workers=1, num_digests=0, num_bytes=0, lost={}, seconds=0.0)

    def _note(self, *what: object) -> None:
        self.events.append(" ".join(map(str, what)))
        if self.fails.get(str(what[0])):
            raise self.fails[str(what[0])].pop(0)


class Scene:
    """One rank's end: an `EngineSide` over engines whose first lives take as long as they are told."""

    def __init__(self, ranks: ThreadRanks, *, num_engines: int, max_restarts: int, slow: set[str]) -> None:
        self.ranks = ranks
        self.fleet = fake_fleet(num_engines)
        for engine in self.fleet.engines:
            if engine.name in slow:
                self.client(engine.name)._delay_s = lambda seed: NEVER_S
        self.publisher = Publisher([engine.name for engine in self.fleet.engines])
        self.max_restarts = max_restarts
        self.side = EngineSide(
            ranks=ranks,
            ledger=TimeLedger(),
            make_sources=dict,
            start=self._start,
            make_publisher=lambda sources, rollouts: cast(Any, self.publisher),
        )
        self.holds_open: Callable[[], bool] = lambda: False

    def client(self, name: str) -> FakeClient:
        return cast(FakeClient, next(engine.client for engine in self.fleet.engines if engine.name == name))

    def process(self, name: str) -> FakeProcess:
        return next(process for process in fake_processes(self.fleet) if process.name == name)

    def state(self, name: str) -> State:
        assert self.side.rollouts is not None
        return next(load.state for load in self.side.rollouts.loads() if load.name == name)

    def collect(self) -> tuple[ScoredGroup, ...]:
        prompts = tuple(Prompt(row=row, prompt="", token_ids=(5, row), columns={}) for row in range(4))
        request = GroupRequest(
            prompts=prompts, num_generations=2, sampling=SAMPLING, seed=lambda prompt, k: 10 * prompt.row + k
        )
        return self.side.collect(request, timeout_s=WAIT_S)

    def step(self, during: Callable[[], None] = lambda: None) -> tuple[ScoredGroup, ...] | None:
        """Collect on rank 0 while something happens; on the other ranks, stand by."""

        def work() -> tuple[ScoredGroup, ...]:
            assert self.side.rollouts is not None
            inner = self.side.rollouts.collect
            happened: list[bool] = []

            def collect(request: Any, *, timeout_s: float, meanwhile: Callable[[], None]) -> Any:
                def both() -> None:
                    if not happened:
                        happened.append(True)
                        during()
                    meanwhile()

                return inner(request, timeout_s=timeout_s, meanwhile=both)

            self.side.rollouts.collect = cast(Any, collect)  # type: ignore[method-assign]
            try:
                return self.collect()
            finally:
                self.side.rollouts.collect = inner  # type: ignore[method-assign]

        give = self.side.during(work)
        return give() if self.ranks.rank == 0 else None

    def _start(self) -> Rollouts:
        async def score(prompt: Prompt, rollouts: tuple[Rollout, ...], completions: Any) -> ScoredGroup:
            import asyncio

            deadline = time.monotonic() + WAIT_S / 2
            while self.holds_open() and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            return ScoredGroup(
                prompt=prompt, rollouts=rollouts, completions=(), rewards=np.zeros((len(rollouts), 1)), extras={}
            )

        settings = RolloutSettings(
            backends=cast(Any, ("gloo",) * len(self.fleet.engines)),
            pool=PoolSettings(
                dispatch=DispatchSettings(max_in_flight=2, affinity_margin=1), stall_s=WAIT_S, poll_s=0.05
            ),
            restarts=RestartSettings(max_in_a_row=self.max_restarts, timeout_s=5.0, first_wait_s=0.01),
        )
        return Rollouts(self.fleet, decode=lambda prompt, rollouts: (), score=score, settings=settings)


def on_scene(
    act: Callable[[Scene], Any],
    *,
    num_ranks: int = 2,
    num_engines: int = 2,
    max_restarts: int = 3,
    slow: tuple[str, ...] = ("engine-0",),
) -> list[Any]:
    """Run something on every rank once weights of version 1 are published; raise what a rank has raised."""

    def run(ranks: ThreadRanks) -> Any:
        scene = Scene(ranks, num_engines=num_engines, max_restarts=max_restarts, slow=set(slow))
        scene.side.publish(1)
        try:
            return act(scene)
        finally:
            scene.side.close()

    outcomes = on_ranks(num_ranks, run)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def kill(scene: Scene, *names: str) -> None:
    for name in names:
        scene.process(name).status = -9


def tokens(groups: tuple[ScoredGroup, ...] | None) -> list[list[list[int]]] | None:
    return None if groups is None else [[rollout.token_ids.tolist() for rollout in group.rollouts] for group in groups]


def writers(groups: tuple[ScoredGroup, ...] | None) -> set[str]:
    return {rollout.engine for group in groups or () for rollout in group.rollouts}


# ---- while engines write ----


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_killed_engine_is_refilled_on_all_ranks_before_the_step_has_ended(
    num_ranks: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="shoal")

    def act(scene: Scene) -> tuple[list[str], Any, set[str], Any]:
        scene.holds_open = lambda: scene.process("engine-0").life == 0 or scene.state("engine-0") is not State.READY
        first = tokens(scene.step(lambda: kill(scene, "engine-0")))
        scene.holds_open = lambda: False
        counts = scene.side.take_counts() if scene.ranks.rank == 0 else {}
        again = scene.step()
        assert tokens(again) == first
        return list(scene.publisher.events), first, writers(again), counts

    first, *others = on_scene(act, num_ranks=num_ranks)
    assert all(
        events == ["connect", "publish 1 engine-0 engine-1", "refill engine-0 1"] for events, *_ in (first, *others)
    )
    assert [len(group) for group in first[1]] == [2] * 4
    assert first[2] == {"engine-0", "engine-1"}
    lost = first[3].pop("rollout/samples_reissued")
    assert first[3] == {"rollout/engines_lost": 1.0, "rollout/engines_restarted": 1.0} and lost == 2.0
    said = [record.getMessage().partition(" 0 s")[0] for record in caplog.records if "engine-0" in record.getMessage()]
    assert [line.partition(":")[0] for line in said] == [
        "engine-0 is lost and will be restarted; the others write what it was writing",
        "engine-0 is restarted after",
        "engine-0 holds weights version 1, proven, and writes again",
    ]


def test_a_step_in_which_nothing_happens_costs_the_other_ranks_one_word() -> None:
    def act(scene: Scene) -> int:
        words: list[int] = []
        json = scene.ranks.json

        def heard(make: Callable[[], Any]) -> Any:
            words.append(1)
            return json(make)

        scene.ranks.json = heard  # type: ignore[method-assign]
        scene.step()
        return len(words)

    assert on_scene(act, slow=()) == [1, 1]


def test_ranks_that_wait_long_hear_of_rank_zero_now_and_then() -> None:
    def run(ranks: ThreadRanks) -> list[str]:
        words, json = [], ranks.json

        def heard(make: Callable[[], Any]) -> Any:
            words.append((order := json(make))["do"])
            return order

        ranks.json = heard  # type: ignore[method-assign]
        rollouts = cast(Any, _NothingBack()) if ranks.rank == 0 else None
        comebacks = Comebacks(ranks, cast(Any, Publisher(["engine-0"])), rollouts, tick_s=0.05)

        def work() -> str:
            for _ in range(3):
                comebacks.meanwhile()
                time.sleep(0.06)
            comebacks.meanwhile()
            return "done"

        give = comebacks.during(work)
        if ranks.rank == 0:
            assert give() == "done"
        comebacks.meanwhile()  # outside of it, nobody listens
        return words

    first, second = on_ranks(2, run)
    assert first == second == ["wait"] * 3 + ["go on"]


class _NothingBack:
    def take_back(self) -> tuple[str, ...]:
        return ()


@pytest.mark.parametrize("error", [RewardError("it raised"), KeyboardInterrupt()])
def test_what_fails_on_rank_zero_is_raised_where_the_result_is_wanted_and_nobody_is_left_waiting(
    error: BaseException,
) -> None:
    def run(ranks: ThreadRanks) -> str:
        comebacks = Comebacks(
            ranks, cast(Any, Publisher(["engine-0"])), cast(Any, _NothingBack()) if ranks.rank == 0 else None
        )

        def fail() -> None:
            raise error

        give = comebacks.during(fail)
        if ranks.rank == 0:
            with pytest.raises(type(error)):
                give()
        return "went on"

    assert on_ranks(2, run) == ["went on"] * 2


# ---- engines that do not come back ----


def test_an_engine_that_does_not_start_again_is_given_up_and_the_other_does_the_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def act(scene: Scene) -> set[str]:
        scene.process("engine-0").may_start = lambda number: False
        scene.holds_open = lambda: scene.state("engine-0") is not State.DEAD
        groups = scene.step(lambda: kill(scene, "engine-0"))
        assert not scene.publisher.events[2:]
        scene.side.publish(2)
        return writers(groups)

    assert on_scene(act, max_restarts=2) == [{"engine-1"}, set()]
    said = [record.getMessage() for record in caplog.records if "given up" in record.getMessage()]
    assert said == [
        "engine-0 is given up, the run goes on with the other engines: 2 attempts to restart it failed; "
        "the last one: engine-0 was told not to start"
    ]


def test_one_that_starts_at_the_second_attempt_is_taken_back() -> None:
    def act(scene: Scene) -> list[str]:
        scene.process("engine-0").may_start = lambda number: number == 2
        scene.holds_open = lambda: scene.process("engine-0").life == 0 or scene.state("engine-0") is not State.READY
        scene.step(lambda: kill(scene, "engine-0"))
        return scene.publisher.events[2:]

    assert on_scene(act, max_restarts=2) == [["refill engine-0 1"]] * 2


def test_a_refill_that_fails_loses_the_engine_again_until_it_has_used_up_its_attempts() -> None:
    def act(scene: Scene) -> list[str]:
        scene.publisher.fails["refill"] = [WeightSyncError(f"no {number}") for number in range(2)]
        scene.holds_open = lambda: scene.state("engine-0") is not State.DEAD
        scene.step(lambda: kill(scene, "engine-0"))
        assert scene.side.rollouts is None or scene.side.rollouts.take_counts()["rollout/engines_lost"] == 3
        return scene.publisher.events[2:]

    assert on_scene(act, max_restarts=2) == [["refill engine-0 1"] * 2] * 2


def test_when_all_are_dead_the_step_waits_for_the_one_that_is_on_its_way() -> None:
    def act(scene: Scene) -> set[str]:
        scene.process("engine-1").may_start = lambda number: False
        return writers(scene.step(lambda: kill(scene, "engine-0", "engine-1")))

    assert on_scene(act, slow=("engine-0", "engine-1"))[0] == {"engine-0"}


@pytest.mark.parametrize("max_restarts", [0, 1])
def test_when_none_is_left_every_rank_gets_one_error_with_each_engines_reason_and_log(max_restarts: int) -> None:
    def act(scene: Scene) -> str:
        for name in ("engine-0", "engine-1"):
            scene.process(name).may_start = lambda number: False
        with pytest.raises(NoEngineError) as failure:
            scene.step(lambda: kill(scene, "engine-0", "engine-1"))
        with pytest.raises(NoEngineError):
            scene.side.publish(2)
        return str(failure.value)

    first, second = on_scene(act, max_restarts=max_restarts, slow=("engine-0", "engine-1"))
    assert first == second and first.startswith("no engine is left to write completions")
    for name in ("engine-0", "engine-1"):
        assert f"{name}.0.log" in first.partition(f"{name}: ")[2]


# ---- between steps ----


def test_an_engine_that_comes_back_while_the_trainer_trains_is_met_before_the_next_publish() -> None:
    def act(scene: Scene) -> list[str]:
        scene.step(lambda: kill(scene, "engine-0"))
        with only_on_rank_zero(scene) as rollouts:
            if rollouts is not None:
                wait_until(lambda: bool(rollouts._restarts._ready))
        scene.side.publish(2)
        groups = scene.step()
        assert scene.ranks.rank != 0 or writers(groups) == {"engine-0", "engine-1"}
        return scene.publisher.events[2:]

    first, second = on_scene(act)
    assert first == second
    assert first in (
        ["admit engine-0", "publish 2 engine-0 engine-1"],
        ["refill engine-0 1", "publish 2 engine-0 engine-1"],  # it came back before the step had ended
    )


def test_one_that_has_died_unseen_is_left_by_all_ranks_before_the_next_publish() -> None:
    def act(scene: Scene) -> list[str]:
        with only_on_rank_zero(scene) as rollouts:
            if rollouts is not None:
                scene.process("engine-1").may_start = lambda number: False
                kill(scene, "engine-1")
        scene.side.publish(2)
        return scene.publisher.events[2:]

    assert on_scene(act, slow=(), max_restarts=1) == [["leave engine-1", "publish 2 engine-0"]] * 2


def test_a_publish_that_loses_all_engines_is_repeated_with_the_first_that_comes_back() -> None:
    def act(scene: Scene) -> list[str]:
        lost = {"engine-0": "it stalled", "engine-1": "it stalled"}
        scene.publisher.fails["publish"] = [EnginesLostError("no engine is left", lost)]
        with only_on_rank_zero(scene) as rollouts:
            if rollouts is not None:
                scene.process("engine-0").may_start = lambda number: False
        report = scene.side.publish(2)
        assert report.version == 2
        return scene.publisher.events[2:]

    first, second = on_scene(act, slow=())
    assert first == second and first[0] == "publish 2 engine-0 engine-1" and first[-1] == "publish 2 engine-1"
    assert "admit engine-1" in first and not [event for event in first if event.startswith("admit engine-0")]


@contextmanager
def only_on_rank_zero(scene: Scene) -> Iterator[Rollouts | None]:
    yield scene.side.rollouts


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_fleet_restarts_one_engine_with_a_client_of_its_own_and_keeps_the_order() -> None:
    import threading

    fleet: Fleet = fake_fleet(3)
    former = fleet.engines[1]
    fleet.end("engine-1")
    restarted = fleet.restart("engine-1", timeout_s=5, stop=threading.Event())
    assert [engine.name for engine in fleet.engines] == ["engine-0", "engine-1", "engine-2"]
    assert fleet.engines[1] is restarted and restarted.client is not former.client
    assert restarted.client.url != former.client.url
    fleet.check_alive()
    cast(FakeProcess, restarted.process).status = 7
    assert fleet.why_ended("engine-1") == "ended with status 7: no reason (see engine-1.1.log)"


def test_an_engine_that_dies_while_it_is_refilled_is_restarted_once_more() -> None:
    def act(scene: Scene) -> list[str]:
        refill = scene.publisher.refill

        def die_first(name: str, address: Any, version: int) -> None:
            scene.publisher.refill = refill  # type: ignore[method-assign]
            if scene.ranks.rank == 0:
                kill(scene, name)
                wait_until(lambda: scene.state(name) is State.STARTING)  # seen by the pool, whose engines write on
            scene.ranks.json(lambda: None)
            scene.publisher.events.append("it dies")
            raise WeightSyncError(f"{name} has died in the middle of a publish")

        scene.publisher.refill = die_first  # type: ignore[method-assign]
        scene.holds_open = lambda: scene.process("engine-0").life < 2 or scene.state("engine-0") is not State.READY
        groups = scene.step(lambda: kill(scene, "engine-0"))
        assert scene.ranks.rank != 0 or len(groups or ()) == 4
        return scene.publisher.events[2:]

    assert on_scene(act) == [["it dies", "refill engine-0 1"]] * 2
