"""Engines that sleep while the trainer works: the order of things, what they write afterwards, and what becomes of one
that does not fall asleep or wake. The server is a stand-in with vLLM's states; HTTP, plans, Gloo and digests are real.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from shoal.engines.client import EngineClient
from shoal.engines.fleet import Fleet, ManagedEngine
from shoal.engines.restarts import RestartSettings
from shoal.errors import NoEngineError, WeightSyncError
from shoal.observe.ledger import TimeLedger
from shoal.protocols import WeightSource
from shoal.rollout.collector import GroupRequest
from shoal.rollout.dispatch import DispatchSettings
from shoal.rollout.health import State
from shoal.rollout.pool import PoolSettings
from shoal.testing import tiny_model
from shoal.testing.sleeping import HeldWeights, SleepingEngine, completion_of
from shoal.trainer.engine_side import EngineSide
from shoal.trainer.exchange import Exchange
from shoal.trainer.rollouts import Rollouts, RolloutSettings
from shoal.trainer.shared_devices import SharedDevice
from shoal.types import Prompt, SamplingSettings, ScoredGroup
from shoal.weights.control import EngineControl
from shoal.weights.group import PublishSettings
from shoal.weights.publisher import WeightPublisher
from shoal.weights.sources import make_source
from shoal.wire.agreement import MODEL

pytestmark = pytest.mark.usefixtures("plain_modules")

CPU = torch.device("cpu")
PATIENCE_S = 120.0  # only a test that fails waits so long
PROMPTS = tuple(Prompt(row=row, prompt="p", token_ids=(5, row), columns={}) for row in range(4))
RECEIVE = ["/shoal/receive", "shoal_receive"]
WAKE = ["/wake_up?tags=weights", *RECEIVE, "/wake_up?tags=kv_cache", "/resume"]


class Process:
    """Stands in for an engine's process."""

    log_path = "engine.log"

    def __init__(self, engine: SleepingEngine, sleeps: bool) -> None:
        self._engine = engine
        self.is_ended = False
        self.spec = SimpleNamespace(sleeps=sleeps)
        self.num_workers = len(engine.workers)

    def exit_status(self) -> int | None:
        return None

    def ask_to_end(self) -> None:
        self.is_ended = True

    def wait_ended(self) -> None: ...


class Site:
    """A model, its optimizer, and engines of which some sleep, behind the trainer's own `EngineSide`."""

    def __init__(
        self, sleeps: Sequence[bool], *, timeout_s: float = PATIENCE_S, cargoes: Sequence[Any] = (MODEL,)
    ) -> None:
        self.model = tiny_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self._cargoes = cargoes
        parameters = make_source(self.model).metadata()
        self.engines = [
            SleepingEngine(f"engine-{i}", [HeldWeights(parameters) for _ in range(1 + i)]) for i in range(len(sleeps))
        ]
        self.processes = [Process(engine, sleep) for engine, sleep in zip(self.engines, sleeps, strict=True)]
        self._timeout_s = timeout_s
        self.shared = SharedDevice(CPU, lambda: self.optimizer)
        self.ledger = TimeLedger()
        self.side = EngineSide(
            ranks=Exchange(rank=0, world_size=1),
            ledger=self.ledger,
            make_sources=self._sources,
            start=self._start,
            make_publisher=self._make_publisher,
            shared=self.shared,
        )

    @property
    def rollouts(self) -> Rollouts:
        assert self.side.rollouts is not None
        return self.side.rollouts

    @property
    def states(self) -> list[State]:
        return [load.state for load in self.rollouts.loads()]

    def write(self, version: int) -> list[tuple[int, list[int], list[int]]]:
        """Have all prompts completed with the weights of this version; return row, tokens and expected tokens."""
        self.side.refresh(version, always=False)
        groups = self.rollouts.collect(
            GroupRequest(
                prompts=PROMPTS,
                num_generations=2,
                sampling=SamplingSettings(temperature=1.0, max_tokens=6, stop_token_ids=()),
                seed=lambda prompt, sample: 10 * prompt.row + sample,
            ),
            timeout_s=PATIENCE_S,
        )
        held = dict(self._source().tensors())
        return [
            (
                group.prompt.row,
                rollout.token_ids.tolist(),
                completion_of(held, group.prompt.token_ids, 10 * group.prompt.row + sample, 6),
            )
            for group in groups
            for sample, rollout in enumerate(group.rollouts)
        ]

    def train(self) -> None:
        """One step of the optimizer."""
        self.model(torch.arange(12)[None]).logits.square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        for engine in self.engines:
            engine.released.set()
        self.side.close()
        for engine in self.engines:
            engine.stop()
            for worker in engine.workers:
                worker._shoal_leave()

    def _source(self) -> WeightSource:
        return make_source(self.model)

    def _sources(self) -> dict[Any, WeightSource]:
        return {cargo: self._source() for cargo in self._cargoes}

    def _start(self) -> Rollouts:
        managed = [
            ManagedEngine(
                process=cast(Any, process),
                client=EngineClient(
                    name=engine.name, url=engine.url, api_key="key", log_path=None, request_timeout_s=PATIENCE_S
                ),
            )
            for engine, process in zip(self.engines, self.processes, strict=True)
        ]

        async def score(prompt: Prompt, rollouts: Any, completions: Any) -> ScoredGroup:
            return ScoredGroup(
                prompt=prompt, rollouts=rollouts, completions=completions, rewards=({"r": 0.0},) * 2, extras={}
            )

        pool = PoolSettings(
            dispatch=DispatchSettings(max_in_flight=4, affinity_margin=1), stall_s=PATIENCE_S, poll_s=0.2
        )
        return Rollouts(
            Fleet(managed),
            decode=lambda prompt, rollouts: ("",) * len(rollouts),
            score=score,
            settings=RolloutSettings(
                backends=("gloo",) * len(managed),
                pool=pool,
                restarts=RestartSettings(max_in_a_row=0, timeout_s=1.0),
            ),
        )

    def _make_publisher(self, sources: Any, rollouts: Rollouts | None) -> WeightPublisher:
        return WeightPublisher(
            sources,
            rollouts.addresses if rollouts is not None else (),
            ranks=Exchange(rank=0, world_size=1),
            device=CPU,
            settings=PublishSettings(host="127.0.0.1", timeout_s=self._timeout_s),
        )


Make = Callable[..., Site]


@pytest.fixture
def site_of() -> Iterator[Make]:
    made: list[Site] = []

    def make(*args: Any, **kwargs: Any) -> Site:
        made.append(Site(*args, **kwargs))
        return made[-1]

    yield make
    for site in made:
        site.close()


def assert_right(written: Sequence[tuple[int, list[int], list[int]]]) -> None:
    assert len(written) == 8
    assert [tokens for _, tokens, _ in written] == [expected for _, _, expected in written]


def test_three_nights_and_after_each_engines_write_what_the_trained_weights_write(site_of: Make) -> None:
    site = site_of([True, False])
    before: list[list[int]] = []
    for version in range(4):
        written = site.write(version)
        assert_right(written)
        now = [tokens for _, tokens, _ in written]
        assert now != before  # the control: other weights write something else
        before = now
        site.side.rest()
        assert site.states == [State.ASLEEP, State.READY]
        site.train()
    asleep, awake = site.engines
    assert asleep.called == [
        *["shoal_meet", "shoal_join", *WAKE, "shoal_lost_asleep"],
        *["/sleep?level=2", *WAKE] * 3,
        "/sleep?level=2",
    ]
    assert awake.called == ["shoal_meet", "shoal_join", *[*RECEIVE, "/resume"] * 4]


def test_what_the_model_keeps_in_buffers_survives_the_night(site_of: Make) -> None:
    site = site_of([True])
    site.write(0)
    site.side.rest()
    (model,) = site.engines[0].models
    assert bool(model.scale.isnan().all()) and all(bool(v.isnan().all()) for v in model.parameters())
    assert_right(site.write(1))
    assert model.scale.tolist() == [2.0] * 3


def test_an_engine_with_tensors_that_no_publish_sends_keeps_a_copy_of_them(
    site_of: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.vllm_compat.drops_asleep", lambda tensor: True)
    site = site_of([True])
    site.engines[0].models[0].absorbed = [torch.ones(2), torch.ones(3)]  # type: ignore[assignment]
    for version in (0, 1):
        assert_right(site.write(version))
        site.side.rest()
        site.train()
    nights = [call for call in site.engines[0].called if call.startswith(("/sleep", "shoal_lost"))]
    assert nights == ["shoal_lost_asleep", "/sleep?level=1", "/sleep?level=1"]
    assert "engine-0 keeps a copy of its weights in host memory while it sleeps: 2 of its tensors" in caplog.text
    assert "(absorbed.0, absorbed.1)" in caplog.text


def test_an_engine_that_is_sent_an_adapter_alone_keeps_its_weights_at_night() -> None:
    from shoal.weights.sleep import _choose_level

    with ThreadPoolExecutor(1) as threads:
        engine = SleepingEngine("engine-0", [HeldWeights(())])
        control = EngineControl(engine, threads, 5.0, sleeps=True)
        assert (_choose_level(control, serves_adapter=True), _choose_level(control, serves_adapter=False)) == (1, 2)
        engine.stop()


def test_the_optimizers_states_are_with_the_host_exactly_while_engines_are_awake(site_of: Make) -> None:
    site = site_of([True])
    site.write(0)
    site.side.rest()
    site.train()
    sizes = state_bytes(site)
    assert min(sizes) > 0
    assert_right(site.write(1))
    assert max(state_bytes(site)) == 0
    site.side.rest()
    assert state_bytes(site) == sizes


def state_bytes(site: Site) -> list[int]:
    """Bytes of each of the optimizer's states where they usually are."""
    return [state[name].untyped_storage().nbytes() for state in site.optimizer.state.values() for name in state]


def test_a_sleeping_engine_is_published_to_before_it_writes_though_nothing_has_changed(site_of: Make) -> None:
    site = site_of([True])
    assert_right(site.write(3))
    assert site.side.refresh(3, always=False) is None  # the control: awake it holds them
    site.side.rest()
    assert site.side.refresh(3, always=False) is not None
    assert_right(site.write(3))


def test_a_sleeping_engine_is_given_nothing_and_not_asked_how_it_is(site_of: Make) -> None:
    site = site_of([True, False])
    site.write(0)
    site.side.rest()
    reports = site.engines[0].num_reports, site.engines[1].num_reports
    called = list(site.engines[0].called)
    groups = site.rollouts.collect(
        GroupRequest(
            prompts=PROMPTS,
            num_generations=2,
            sampling=SamplingSettings(temperature=1.0, max_tokens=6, stop_token_ids=()),
            seed=lambda prompt, sample: sample,
        ),
        timeout_s=PATIENCE_S,
    )
    assert {rollout.engine for group in groups for rollout in group.rollouts} == {"engine-1"}
    assert site.engines[0].num_reports == reports[0] and site.engines[1].num_reports > reports[1]
    assert site.engines[0].called == called


@pytest.mark.parametrize(
    ("step", "how", "says"),
    [
        ("/sleep?level=2", "fails", r"putting to sleep engine-0 failed at /sleep\?level=2"),
        ("/sleep?level=2", "stalls", r"(did not fall asleep|failed at /sleep\?level=2).*6 s"),
        ("/wake_up?tags=weights", "fails", r"engine-0 failed at /wake_up\?tags=weights.*lower vllm_gpu_memory_util"),
        ("/wake_up?tags=kv_cache", "fails", r"engine-0 failed at /wake_up\?tags=kv_cache.*lower vllm_gpu_memory_util"),
        ("/wake_up?tags=kv_cache", "stalls", r"engine-0.*6 s"),
    ],
)
def test_an_engine_that_does_not_fall_asleep_or_wake_leaves_and_the_others_go_on(
    site_of: Make, caplog: pytest.LogCaptureFixture, step: str, how: str, says: str
) -> None:
    site = site_of([True, True], timeout_s=6.0 if how == "stalls" else PATIENCE_S)
    assert_right(site.write(0))
    getattr(site.engines[0], f"{how}_at").add(step)
    site.side.rest()
    site.train()
    assert_right(site.write(1))
    assert site.states == [State.DEAD, State.READY]
    assert [process.is_ended for process in site.processes] == [True, False]
    assert [record for record in caplog.records if "leaves the group" in record.message]
    assert re.search(says, caplog.text)
    site.side.rest()
    site.train()
    assert_right(site.write(2))


def test_with_no_engine_left_that_sleeps_the_error_says_why(site_of: Make) -> None:
    site = site_of([True])
    site.write(0)
    site.engines[0].fails_at.add("/sleep?level=2")
    with pytest.raises(WeightSyncError, match=r"no engine is left: .*told to fail"):
        site.side.rest()


@pytest.mark.parametrize("beside, emptied", [(0, 1), (1, 0)], ids=["it sleeps", "it does not"])
def test_memory_is_given_back_in_a_publish_only_to_an_engine_that_is_waking_on_this_device(
    site_of: Make, monkeypatch: pytest.MonkeyPatch, beside: int, emptied: int
) -> None:
    """Taking it again costs the next training step time, so whoever has kept its own gets none."""
    site = site_of([True, False])
    site.write(0)
    site.side.rest()
    site.train()
    assert site.side.publisher is not None
    line = site.side.publisher.group.lines[beside]
    line.preferred = (frozenset({0}),) * line.num_workers
    calls: list[None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(None))
    site.side.publish(1)
    assert len(calls) == emptied


# ---- the stand-in enforces vLLM's states ----


def test_the_stand_in_does_not_answer_while_it_sleeps_and_writes_nonsense_before_a_publish(site_of: Make) -> None:
    site = site_of([True])
    site.write(0)
    site.side.rest()
    engine = site.engines[0]
    request = {"prompt": [5], "seed": 0, "max_tokens": 3}
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(engine.complete(request)))
    asking.start()
    asking.join(0.2)
    assert asking.is_alive() and not answers
    engine.post("/wake_up?tags=weights", None, 1.0)
    asking.join(0.2)
    assert asking.is_alive()
    engine.post("/wake_up?tags=kv_cache", None, 1.0)
    asking.join(10.0)
    (choice,) = answers[0]["choices"]
    assert all(value != value for value in choice["logprobs"]["token_logprobs"])


def test_the_stand_in_dies_of_weights_that_it_has_no_memory_for(site_of: Make) -> None:
    site = site_of([False])
    site.write(0)
    site.engines[0].post("/sleep?level=2", None, 1.0)  # the publisher wakes none that is not to sleep
    with pytest.raises(NoEngineError, match="not mapped"):
        site.side.publish(1)
    assert site.engines[0].is_dead
