"""Write arriving checkpoint parameters into a worker's model, following its slice plan, and digest what it holds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import nn

from shoal import vllm_compat
from shoal.wire.digest import digest
from shoal.wire.plan import Slice, SlicePlan, dtype_name


@dataclass(slots=True)
class _Layer:
    """One module that has parameters in the plan."""

    module: nn.Module
    is_reloaded: bool
    slices: list[int] = field(default_factory=list)
    fills: list[int] = field(default_factory=list)
    num_missing: int = 0
    is_open: bool = False


class ParameterSink:
    """Takes full checkpoint parameters in any order; at most the layers under way are held twice.

    A layer that keeps its layout is written where it lies and digested at the end. A layer whose layout vLLM changes
    gets fresh parameters, is digested once they are complete, and is then processed by vLLM into its former storage:
    what its kernels hold afterwards cannot be read back (on CPUs the weight is packed and dropped).

    Use once per publish, and call `close` in `finally`.
    """

    def __init__(self, model: nn.Module, plan: SlicePlan) -> None:
        self._model = model
        self._plan = plan
        self._digests: dict[int, int] = {}
        self._layers = _group_by_layer(model, plan)
        for layer in self._layers.values():
            layer.num_missing = len(layer.slices)

    @torch.no_grad()
    def write(self, name: str, value: torch.Tensor) -> None:
        """Write every slice that comes from checkpoint parameter `name`; `value` is the full tensor, contiguous."""
        for index in self._plan.by_source.get(name, ()):
            piece = self._plan.slices[index]
            layer = self._layers[_split(piece.target)[0]]
            if layer.is_reloaded and not layer.is_open:
                vllm_compat.open_for_loading(layer.module)
                layer.is_open = True
            self._target(piece.target, piece).copy_(piece.source_region.view(value))
            layer.num_missing -= 1
            if layer.num_missing == 0:
                self._complete(layer)

    def finish(self) -> list[int]:
        """Return one digest for each slice of the plan, in its order, of what this worker now holds.

        Raises:
            RuntimeError: Not every parameter of the plan was written.
        """
        missing = [prefix for prefix, layer in self._layers.items() if layer.num_missing]
        if missing:
            raise RuntimeError(f"{self._plan.worker}: the publish ended without weights for {missing[:5]}")
        for layer in self._layers.values():
            if not layer.is_reloaded:
                self._digest(layer)
        self._repack_tied()
        return [self._digests[index] for index in range(len(self._plan.slices))]

    def close(self) -> None:
        """Give layers that are still open their former parameters back. Harmless after `finish`."""
        for layer in self._layers.values():
            if layer.is_open:
                vllm_compat.abandon(layer.module)
                layer.is_open = False

    def _complete(self, layer: _Layer) -> None:
        for index in layer.fills:
            fill = self._plan.fills[index]
            fill.target_region.view(self._parameter(fill.target)).fill_(fill.value)
        if layer.is_reloaded:
            self._digest(layer)
            vllm_compat.process_and_close(layer.module)
            layer.is_open = False

    def _digest(self, layer: _Layer) -> None:
        for index in layer.slices:
            piece = self._plan.slices[index]
            self._digests[index] = digest(self._target(piece.target, piece))

    def _repack_tied(self) -> None:
        """Repack layers that share a parameter with a written one: a tied `lm_head` keeps its own packed copy."""
        written = {
            id(value)
            for layer in self._layers.values()
            for value in vllm_compat.layer_parameters(layer.module).values()
        }
        targets = {id(layer.module) for layer in self._layers.values()}
        for module in self._model.modules():
            if id(module) in targets or vllm_compat.keeps_layout(module):
                continue
            if any(id(value) in written for value in vllm_compat.layer_parameters(module).values()):
                vllm_compat.process_again(module)

    def _target(self, name: str, piece: Slice) -> torch.Tensor:
        parameter = self._parameter(name)
        if dtype_name(parameter.dtype) != piece.dtype:
            raise RuntimeError(f"{name} is {parameter.dtype}, but the plan says {piece.dtype}")
        return piece.target_region.view(parameter)

    def _parameter(self, name: str) -> torch.Tensor:
        prefix, local = _split(name)
        value = getattr(self._layers[prefix].module, local)
        assert isinstance(value, torch.Tensor)
        return value.data


def _split(name: str) -> tuple[str, str]:
    prefix, _, local = name.rpartition(".")
    return prefix, local


def _group_by_layer(model: nn.Module, plan: SlicePlan) -> dict[str, _Layer]:
    reloaded = {_split(name)[0] for name in plan.reloaded}
    layers: dict[str, _Layer] = {}
    slices: dict[str, list[int]] = defaultdict(list)
    fills: dict[str, list[int]] = defaultdict(list)
    for index, piece in enumerate(plan.slices):
        slices[_split(piece.target)[0]].append(index)
    for index, fill in enumerate(plan.fills):
        fills[_split(fill.target)[0]].append(index)
    for prefix in slices:
        layers[prefix] = _Layer(
            module=model.get_submodule(prefix),
            is_reloaded=prefix in reloaded,
            slices=slices[prefix],
            fills=fills[prefix],
        )
    return layers
