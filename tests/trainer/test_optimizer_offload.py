"""Optimizer states that go to the host and come back: the same bits, the same tensors, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.optimization import Adafactor

from shoal.errors import ConfigError
from shoal.trainer.optimizer_offload import OptimizerOffload

CPU = torch.device("cpu")


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def step(model: nn.Module, optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 7, generator=generator)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def tensors(optimizer: Any) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def num_bytes(optimizer: Any) -> int:
    return sum(value.untyped_storage().nbytes() for value in tensors(optimizer))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.9),
    "Adafactor": lambda parameters: Adafactor(parameters, lr=0.1, beta1=0.9, relative_step=False),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_as_if_nothing_had_been_moved(kind: str) -> None:
    models = [model_of(3), model_of(3)]
    plain, moved = (OPTIMIZERS[kind](model.parameters()) for model in models)
    offload = OptimizerOffload(Accelerator(cpu=True).prepare_optimizer(moved), CPU)
    offload.park()  # there is nothing yet
    for number in range(4):
        step(models[0], plain, number)
        step(models[1], moved, number)
        before = [value.clone() for value in tensors(moved)]
        identities, size = [id(value) for value in tensors(moved)], num_bytes(moved)
        offload.park()
        assert num_bytes(moved) == 0 and offload.num_bytes_parked == size > 0
        offload.bring_back()
        assert offload.num_bytes_parked == 0 and num_bytes(moved) == size
        assert [id(value) for value in tensors(moved)] == identities
        assert all(torch.equal(now, then) for now, then in zip(tensors(moved), before, strict=True))
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models), strict=True))
    step(models[1], moved, 9)  # the control: a step more is seen
    assert not all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models), strict=True))


@pytest.mark.parametrize("needs", ["a step", "a checkpoint"])
def test_whoever_needs_the_states_has_them_brought_back_first(needs: str) -> None:
    models = [model_of(3), model_of(3)]
    plain, moved = (torch.optim.AdamW(model.parameters(), lr=0.1) for model in models)
    offload = OptimizerOffload(moved, CPU)
    for optimizer, model in ((plain, models[0]), (moved, models[1])):
        step(model, optimizer, 0)
    offload.park()
    if needs == "a step":
        step(models[0], plain, 1)
        step(models[1], moved, 1)
    wanted, saved = (optimizer.state_dict()["state"] for optimizer in (plain, moved))
    assert all(torch.equal(wanted[i][name], saved[i][name]) for i in wanted for name in wanted[i])
    assert num_bytes(moved) > 0


def test_host_memory_is_used_again_and_parking_twice_changes_nothing() -> None:
    model = model_of(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    offload = OptimizerOffload(optimizer, CPU)
    homes = []
    for number in range(3):
        step(model, optimizer, number)
        offload.park()
        offload.park()
        homes.append(sorted(item.home.data_ptr() for item in offload._parked))
        offload.bring_back()
        offload.bring_back()
    assert homes[0] == homes[1] == homes[2] and all(bool(value.isfinite().all()) for value in tensors(optimizer))


def test_a_state_that_shares_memory_moves_once_and_one_that_is_the_weights_stays() -> None:
    model = model_of(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, 0)
    first, second, *_ = model.parameters()
    flat = torch.arange(40.0)
    optimizer.state[first]["momentum_buffer"] = flat[:35].view(5, 7)
    optimizer.state[second]["momentum_buffer"] = flat[35:]
    optimizer.state[second]["anchor"] = second.data
    offload = OptimizerOffload(optimizer, CPU)
    offload.park()
    assert flat.untyped_storage().nbytes() == 0 and second.untyped_storage().nbytes() == 20
    offload.bring_back()
    assert flat.tolist() == list(range(40))
    assert torch.equal(optimizer.state[first]["momentum_buffer"].flatten(), torch.arange(35.0))


@pytest.mark.usefixtures("one_process_group")
def test_sharded_states_are_moved_as_they_lie_on_this_rank() -> None:
    mesh = init_device_mesh("cpu", (1,))
    weight = nn.Parameter(distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Shard(0)]))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    offload = OptimizerOffload(optimizer, CPU)
    (weight * 2).sum().backward()
    optimizer.step()
    average = optimizer.state[weight]["exp_avg"]
    assert isinstance(average, DTensor)
    before = average.to_local().clone()
    offload.park()
    assert average.to_local().untyped_storage().nbytes() == 0
    offload.bring_back()
    assert optimizer.state[weight]["exp_avg"] is average and torch.equal(average.to_local(), before)
    assert weight.to_local().untyped_storage().nbytes() == 48  # the weights have stayed


class Quantised(torch.Tensor):
    """A tensor of some other kind."""


def test_what_cannot_be_moved_is_refused_and_said_what_to_do_instead() -> None:
    model = model_of(1)
    with pytest.raises(ConfigError, match=r"object does not keep them in plain tensors\. Use an optimizer of torch"):
        OptimizerOffload(object(), CPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    offload = OptimizerOffload(optimizer, CPU)
    first = next(iter(model.parameters()))
    optimizer.state[first]["m"] = torch.zeros(3).as_subclass(Quantised)
    with pytest.raises(ConfigError, match="Quantised does not keep them in plain tensors"):
        offload.park()
    optimizer.state[first] = {"m": torch.zeros(3, device="meta")}  # elsewhere than the device whose memory is wanted
    with pytest.raises(ConfigError, match="has no effect: SGD has no states on cpu"):
        offload.park()


def test_after_closing_the_optimizer_is_as_it_was() -> None:
    model = model_of(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    offload = OptimizerOffload(optimizer, CPU)
    step(model, optimizer, 0)
    offload.park()
    offload.close()
    assert num_bytes(optimizer) > 0 and not optimizer._optimizer_step_pre_hooks
    assert offload.serves(Accelerator(cpu=True).prepare_optimizer(optimizer)) and not offload.serves(None)
