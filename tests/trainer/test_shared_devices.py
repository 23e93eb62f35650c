"""Which engines sleep, what is refused where none does, and what a rank gives back for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import GRPOConfig, GRPOTrainer
from shoal.errors import ConfigError, EngineError
from shoal.observe.ledger import TimeLedger
from shoal.placement.devices import CPU
from shoal.placement.records import EnginePlacement, PlacementPlan
from shoal.testing import tiny_model
from shoal.testing.placement import plan_on
from shoal.testing.ranks import ThreadRanks, on_ranks
from shoal.testing.trainer import ReferenceTrainer
from shoal.trainer.engine_side import EngineSide
from shoal.trainer.factory import draw_blueprint
from shoal.trainer.rollouts import RollCall
from shoal.trainer.shared_devices import SharedDevice, check_sharing, sleeps
from shoal.types import PublishReport
from shoal.weights.sleep import SleepReport


def config(**settings: Any) -> GRPOConfig:
    return GRPOConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    ("plan", "setting", "expected"),
    [
        pytest.param(plan_on(1, "auto"), None, [True], id="one GPU for everything"),
        pytest.param(plan_on(2, "colocate", num_trainer_processes=2), None, [True, True], id="colocated"),
        pytest.param(
            plan_on(2, "colocate", num_trainer_processes=2), False, [False, False], id="colocated, told not to"
        ),
        pytest.param(plan_on(2, "cuda:0,cuda:1"), True, [True, False], id="one shared, one not"),
        pytest.param(plan_on(2, "auto"), None, [False], id="a GPU of its own"),
        pytest.param(plan_on(0, "cpu:2"), None, [False, False], id="CPUs"),
    ],
)
def test_engines_sleep_that_share_a_gpu_with_the_trainer(
    plan: PlacementPlan, setting: bool | None, expected: list[bool], tmp_path: Path
) -> None:
    args = config(vllm_enable_sleep_mode=setting)
    args.output_dir = str(tmp_path)
    check_sharing(plan.engines, args)
    assert [sleeps(engine, args) for engine in plan.engines] == expected
    specs = draw_blueprint(plan, model=tiny_model(), args=args, max_model_len=9).specs
    assert [spec.sleeps for spec in specs] == expected
    shares = [
        0.6 if asleep else 0.3 if engine.colocated else 0.9
        for asleep, engine in zip(expected, plan.engines, strict=True)
    ]
    assert [spec.gpu_memory_utilization for spec in specs] == shares


@pytest.mark.parametrize("name", ["vllm_enable_sleep_mode", "offload_optimizer_during_rollout"])
def test_a_setting_for_shared_gpus_is_refused_where_there_are_none(
    name: str, make_trainer: Callable[..., GRPOTrainer]
) -> None:
    engine = EnginePlacement(
        name="engine-0",
        devices=(CPU,),
        cpu_cores=(0,),
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        colocated=False,
    )
    with pytest.raises(ConfigError, match=rf'{name}=True has no effect.*set vllm_devices="colocate"'):
        check_sharing([engine], config(**{name: True}))
    with pytest.raises(ConfigError, match=f"{name}=True has no effect"):
        make_trainer(**{name: True})


class Engines:
    """A publisher and rollouts that note what is asked of them, among what the trainer does."""

    plans = ()
    version: int | None = None

    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def note(*arguments: Any, **_: Any) -> Any:
            if name == "roll_call":
                return RollCall(gone=(), back=(), is_one_there=True)
            self.events.append(name)
            if name == "publish":
                return PublishReport(
                    version=arguments[0], num_workers=1, num_digests=0, num_bytes=0, lost={}, seconds=0.0
                )
            return SleepReport(asleep=(), lost={}) if name == "sleep" else None

        return note


class Sharing:
    """A `SharedDevice` that notes what it does, and fails where it is told to."""

    def __init__(self, events: list[str], fails: bool) -> None:
        self._events, self._fails = events, fails

    def give(self) -> None:
        self._events.append("give")
        if self._fails:
            raise RuntimeError("no host memory")

    def take(self) -> None:
        self._events.append("take")


def side_of(ranks: ThreadRanks, engines: Engines, *, fails: bool = False) -> EngineSide:
    made: Any = engines
    shared: Any = Sharing(engines.events, fails)
    return EngineSide(
        ranks=ranks,
        ledger=TimeLedger(),
        make_sources=dict,
        start=lambda: made,
        make_publisher=lambda sources, rollouts: made,
        shared=shared,
    )


def test_memory_is_given_before_engines_start_or_wake_and_taken_once_they_sleep() -> None:
    def run(ranks: ThreadRanks) -> list[str]:
        engines = Engines()
        side = side_of(ranks, engines)
        side.rest()  # nothing runs yet
        for version in range(2):
            side.publish(version)
            side.rest()
        return list(engines.events)  # before the engines are closed

    first, second = on_ranks(2, run)
    night = ["give", "publishing", "publish", "take", "sleep", "asleep", "take"]
    assert first == ["give", "connect", *night[1:], *night]
    assert second == ["give", "connect", "publish", "sleep", "take", "give", "publish", "sleep", "take"]


def test_no_engine_wakes_when_a_rank_could_not_give_its_memory_back_and_all_ranks_learn_of_it() -> None:
    def run(ranks: ThreadRanks) -> list[str]:
        engines = Engines()
        with pytest.raises((RuntimeError, EngineError), match="no host memory"):
            side_of(ranks, engines, fails=ranks.rank == 1).publish(0)
        return list(engines.events)  # before the engines are closed

    assert on_ranks(2, run) == [["give"], ["give"]]


def test_a_new_optimizer_is_taken_up_and_the_former_one_is_left_as_it_was() -> None:
    model = tiny_model()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for _ in range(2)]
    model(torch.arange(5)[None]).logits.sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    now: list[Any] = [None]
    shared = SharedDevice(torch.device("cpu"), lambda: now[0])

    def sizes() -> list[int]:
        return [
            sum(state["momentum_buffer"].untyped_storage().nbytes() for state in optimizer.state.values())
            for optimizer in optimizers
        ]

    whole = sizes()
    shared.give()
    assert sizes() == whole
    now[0] = optimizers[0]
    shared.give()
    assert sizes() == [0, whole[1]]
    now[0] = optimizers[1]
    shared.give()
    assert sizes() == [whole[0], 0]
    shared.take()
    assert sizes() == whole


class SharingTrainer(ReferenceTrainer):
    """Trains as if its engine slept in between, and notes when it publishes."""

    def _shared_device(self, args: GRPOConfig) -> SharedDevice | None:
        return SharedDevice(args.device, lambda: self.optimizer)


def test_training_with_engines_that_sleep_gives_the_same_weights_and_publishes_when_they_wake(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def noting(name: str) -> Any:
        inner = getattr(EngineSide, name)

        def call(self: EngineSide, *args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return inner(self, *args, **kwargs)

        return call

    for name in ("publish", "rest"):
        monkeypatch.setattr(EngineSide, name, noting(name))
    trained = []
    for kind in (ReferenceTrainer, SharingTrainer):
        events.clear()
        trainer = make_trainer(kind=kind, max_steps=3, save_strategy="no")
        trainer.train()
        trained.append([value.detach().clone() for value in trainer.model.parameters()])
        handover = {"seconds/make_room", "seconds/wake", "seconds/sleep"}
        logged = [handover & set(entry) for entry in trainer.state.log_history if "loss" in entry]
        assert logged == [handover if kind is SharingTrainer else set()] * 3
        if kind is SharingTrainer:
            assert events == ["publish", "rest"] * 3
        else:
            assert events == ["publish", "rest", "publish"] + ["rest", "publish"] * 2
        trainer.close()
    assert all(torch.equal(*pair) for pair in zip(*trained, strict=True))
