"""An adapter over weights of 4 bits trains as it would over the numbers that they stand for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shoal.testing import tiny_model
from shoal.weights.sources import make_source

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (pip install 'shoal[qlora]')",
)

STEPS: dict[str, Any] = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant"}


def trained(trainer: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train, and return the adapter and the losses."""
    trainer.train()
    adapter = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    return adapter, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_three_steps_over_4_bits_are_those_over_the_dequantised_weights(
    make_trainer: Callable[..., Any], load_script: Callable[[str], Any]
) -> None:
    script = load_script("one_step")
    quantised = script.quantised(tiny_model())
    packed = {name: value.detach().clone() for name, value in quantised.named_parameters()}
    numbers = tiny_model()
    values = {name: value.clone() for name, value in make_source(quantised).tensors()}
    moved = 0.0
    with torch.no_grad():
        for name, value in numbers.named_parameters():
            moved = max(moved, float((value - values[name].view_as(value)).abs().max()))
            value.copy_(values[name].view_as(value))
    assert moved > 1e-3  # it was quantised

    over_bits = make_trainer(model=script.adapted(quantised), **STEPS)
    before = {name: value.detach().clone() for name, value in over_bits.model.named_parameters()}
    adapter, losses = trained(over_bits)
    expected, expected_losses = trained(make_trainer(model=script.adapted(numbers), **STEPS))
    other, _ = trained(make_trainer(model=script.adapted(tiny_model()), **STEPS))

    assert losses == pytest.approx(expected_losses, abs=1e-5) and len(losses) == 3
    assert adapter.keys() == expected.keys()
    for name, value in adapter.items():
        change = (expected[name] - before[name]).norm()
        assert change > 0 and (value - expected[name]).norm() < 1e-4 * change, name
    assert any((value - other[name]).norm() > 1e-2 * (value - before[name]).norm() for name, value in adapter.items())
    for name, value in over_bits.model.get_base_model().named_parameters():
        if "lora_" not in name:
            bits, as_before = value.detach(), packed[name.replace(".base_layer", "")]  # as numbers, some are nan
            assert torch.equal(bits.view(torch.uint8), as_before.view(torch.uint8)), name
