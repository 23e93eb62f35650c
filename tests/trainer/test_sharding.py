"""Each kind of sharding is told when gradients are exchanged, and what accelerate would ignore is refused."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from datasets import Dataset
from torch import nn

from shoal import GRPOConfig
from shoal.errors import ConfigError
from shoal.trainer.sharding import (
    backward_keywords,
    check_precision,
    check_sharding,
    gradient_exchange,
    whole_state_dict,
)


class FakeEngine:
    """What accelerate calls of a DeepSpeed engine."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.calls.append(("boundary", is_boundary))

    def backward(self, loss: Any, scale_wrt_gas: bool = True) -> None:
        self.calls.append(("backward", scale_wrt_gas))

    def step(self) -> None:
        self.calls.append("step")


def fake_deepspeed() -> tuple[Any, FakeEngine]:
    """An accelerator under DeepSpeed, with accelerate's own wrapper around a fake engine."""
    engine = FakeEngine()
    wrapper = DeepSpeedEngineWrapper(engine)
    state = SimpleNamespace(sync_gradients=True)
    state._set_sync_gradients = lambda value: setattr(state, "sync_gradients", value)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        gradient_state=state,
        backward=lambda loss, **keywords: wrapper.backward(loss, sync_gradients=state.sync_gradients, **keywords),
    )
    return accelerator, engine


def test_deepspeed_steps_once_after_the_last_micro_batch_and_divides_nothing() -> None:
    accelerator, engine = fake_deepspeed()
    for ends_step in (False, False, True):
        with gradient_exchange(accelerator, nn.Linear(1, 1), ends_step=ends_step):
            accelerator.backward(torch.ones(()), **backward_keywords(accelerator))
    backward = ("backward", False)
    assert engine.calls == [("boundary", False), backward] * 2 + [("boundary", True), backward, "step"]


def test_left_alone_deepspeed_would_step_after_each_micro_batch() -> None:
    accelerator, engine = fake_deepspeed()
    for _ in range(3):
        accelerator.backward(torch.ones(()))
    assert engine.calls.count("step") == 3 and ("backward", True) in engine.calls


def test_only_deepspeed_is_told_not_to_divide() -> None:
    assert backward_keywords(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)) == {}


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_that_accelerate_would_ignore_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, state=SimpleNamespace())
    check_sharding(accelerator)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ConfigError, match="is asked for, but accelerate would train with MULTI_CPU and ignore it"):
        check_sharding(accelerator)


def test_deepspeed_whose_processes_have_not_met_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, num_processes=2, state=SimpleNamespace())
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_sharding(accelerator)
    accelerator.num_processes = 1
    with pytest.raises(ConfigError, match="in 2 processes, each of which accelerate takes for one of 1"):
        check_sharding(accelerator)


def test_fsdp_of_the_first_version_is_refused() -> None:
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    )
    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        check_sharding(accelerator)
    accelerator.state.fsdp_plugin.fsdp_version = 2
    check_sharding(accelerator)


def test_layers_split_over_processes_are_refused() -> None:
    split = SimpleNamespace(tp_enabled=True, tp_size=2)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.MULTI_GPU, state=SimpleNamespace(), parallelism_config=split
    )
    with pytest.raises(ConfigError, match="tp_size=2 splits layers"):
        check_sharding(accelerator)


@pytest.mark.parametrize(
    ("bf16", "precision", "fits"), [(False, "bf16", False), (True, "bf16", True), (False, "no", True)]
)
def test_a_precision_that_the_settings_do_not_know_is_refused(bf16: bool, precision: str, fits: bool) -> None:
    accelerator, args = SimpleNamespace(mixed_precision=precision), SimpleNamespace(bf16=bf16, fp16=False)
    with nullcontext() if fits else pytest.raises(ConfigError, match="mixed_precision is bf16, but bf16=False"):
        check_precision(accelerator, args)


def test_a_model_is_saved_whole_and_checkpoints_stay_in_parts() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with whole_state_dict(accelerator):
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    with whole_state_dict(SimpleNamespace(state=SimpleNamespace())):
        pass


def test_a_zero3_model_is_saved_whole_and_checkpoints_stay_in_parts() -> None:
    zero = SimpleNamespace(gather_16bit_weights_on_model_save=False)
    engine = SimpleNamespace(_config=SimpleNamespace(zero_config=zero))
    accelerator = SimpleNamespace(state=SimpleNamespace(), deepspeed_engine_wrapped=SimpleNamespace(engine=engine))
    with whole_state_dict(accelerator):
        assert zero.gather_16bit_weights_on_model_save
    assert not zero.gather_16bit_weights_on_model_save


def test_evaluating_a_model_that_is_still_to_be_divided_is_refused(make_trainer: Any) -> None:
    trainer = make_trainer(eval_dataset=Dataset.from_list([{"prompt": "a"}]))
    trainer._limit.tokens = None  # as accelerate's FSDP leaves it until training begins
    with pytest.raises(ConfigError, match="has no divided model to publish from"):
        trainer.evaluate()


def test_accelerates_fp16_is_not_overruled_by_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setattr("shoal.config.grpo_config.is_torch_bf16_gpu_available", lambda: True)
    config = GRPOConfig(output_dir=str(tmp_path))
    assert config.fp16 and not config.bf16
