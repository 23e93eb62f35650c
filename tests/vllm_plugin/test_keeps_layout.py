"""Which layers are written in place: on CUDA those whose method computes with the weights as they were loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading
from vllm.platforms import current_platform

from shoal.vllm_compat import keeps_layout, process_again


class Method(QuantizeMethodBase):  # type: ignore[misc]
    """A method whose class name is what `keeps_layout` looks at."""

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None: ...

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError


def method(name: str, **attributes: Any) -> QuantizeMethodBase:
    made: QuantizeMethodBase = type(name, (Method,), attributes)()
    return made


def layer_with(method: QuantizeMethodBase | None, *names: str) -> nn.Module:
    """Return a layer as vLLM leaves it after it was built: its metadata recorded."""
    layer: Any = nn.Module()
    for name in names:
        layer.register_parameter(name, nn.Parameter(torch.zeros(4, 3), requires_grad=False))
    layer.quant_method = method
    record_metadata_for_reloading(layer)
    result: nn.Module = layer
    return result


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)


@pytest.mark.usefixtures("on_cuda")
def test_a_dense_layer_is_written_in_place_on_cuda_with_its_bias_and_one_of_another_layout_is_not() -> None:
    layer = layer_with(method("UnquantizedLinearMethod"), "weight", "bias")
    assert keeps_layout(layer)
    layer.weight = nn.Parameter(torch.zeros(3, 4).t(), requires_grad=False)
    assert not keeps_layout(layer)


@pytest.mark.usefixtures("on_cuda")
def test_a_parameter_that_appeared_after_the_metadata_was_recorded_is_a_change_of_layout_unless_it_is_a_bias() -> None:
    for name, keeps in (("bias", True), ("scale", False)):
        layer = layer_with(method("UnquantizedLinearMethod"), "weight")
        layer.register_parameter(name, nn.Parameter(torch.zeros(4), requires_grad=False))
        assert keeps_layout(layer) is keeps, name


@pytest.mark.usefixtures("on_cuda")
def test_quantised_layers_go_through_the_reload_on_cuda() -> None:
    assert not keeps_layout(layer_with(method("Fp8LinearMethod"), "weight"))


def test_a_dense_layer_goes_through_the_reload_elsewhere_and_a_norm_with_a_bias_does_not() -> None:
    assert not keeps_layout(layer_with(method("UnquantizedLinearMethod"), "weight"))
    assert keeps_layout(layer_with(None, "weight", "bias"))


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("backend", list(UnquantizedMoeBackend), ids=lambda backend: str(backend.name))
def test_of_the_backends_for_experts_only_triton_is_written_in_place(backend: Any) -> None:
    experts = method("UnquantizedFusedMoEMethod", unquantized_backend=backend)
    # Where adapters are served, vLLM puts this before it once the weights are processed.
    applying = method("FusedMoEModularMethod", old_quant_method=experts)
    for given in (experts, applying):
        assert keeps_layout(layer_with(given, "w13_weight", "w2_weight")) is ("TRITON" in backend.name)


def test_weights_are_processed_again_by_the_method_that_did_it_first() -> None:
    processed: list[str] = []

    def packs(self: Any, layer: nn.Module) -> None:
        processed.append(type(self).__name__)

    experts = method("UnquantizedFusedMoEMethod", process_weights_after_loading=packs)
    process_again(layer_with(experts, "w13_weight"))
    process_again(layer_with(method("FusedMoEModularMethod", old_quant_method=experts), "w13_weight"))
    assert processed == ["UnquantizedFusedMoEMethod"] * 2
