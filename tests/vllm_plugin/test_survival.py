"""Which of a model's tensors would be lost with the memory that it was loaded into."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from shoal.vllm_plugin.survival import lost_asleep


class Kernel:
    """Stands in for an object of vLLM's that a layer calls its kernel through."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.workspace: Any = {"slopes": torch.ones(4)}
        self.itself = self


Kernel.__module__ = "vllm.kernels"


def model_of() -> Any:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[1].register_buffer("table", torch.ones(5), persistent=False)
    return model


def test_parameters_and_buffers_and_views_of_them_come_back() -> None:
    model = model_of()
    model[0].rows = [model[0].weight.data[1:], model[1].table[2:]]
    assert lost_asleep(model, lambda tensor: True) == []


def test_everything_else_is_named_wherever_it_hangs() -> None:
    model = model_of()
    model[0].absorbed = torch.ones(2)
    model[0].stacked = (torch.zeros(1), torch.zeros(2))
    model[1].impl = Kernel(model[0])
    model.once_more = model[1].impl
    assert sorted(lost_asleep(model, lambda tensor: True)) == [
        "0.absorbed",
        "0.stacked.0",
        "0.stacked.1",
        "once_more.workspace.slopes",  # seen once, where it is found first
    ]


def test_what_holds_no_data_or_lies_elsewhere_or_belongs_to_nobody_of_vllms_is_left_out() -> None:
    model = model_of()
    model[0].empty, model[0].planned = torch.empty(0), torch.empty(3, device="meta")
    model[0].foreign = SimpleNamespace(value=torch.ones(2))
    model[0].elsewhere, model[0].here = torch.ones(7), torch.ones(8)
    assert lost_asleep(model, lambda tensor: tensor.numel() == 8) == ["0.here"]
