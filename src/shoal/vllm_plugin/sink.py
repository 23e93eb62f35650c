"""Where arriving pieces go: into a worker's own parameters, following its slice plan; and what it then holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from shoal import vllm_compat
from shoal.wire.digest import DigestPlan, Run, digests, unsigned
from shoal.wire.plan import SlicePlan, dtype_from_name, dtype_name
from shoal.wire.schedule import Message
from shoal.wire.side_stream import SideStream

_BYTES_PER_DIGEST = 256 << 20  # a launch takes some 0.1 ms, during which NCCL's next kernel may wait for it


@dataclass(slots=True)
class _Share:
    """Layers that stay where they lie and are digested together.

    Attributes:
        slices: Of all of them.
        num_layers: How many they are.
        num_missing: How many of them are not complete in this publish.
        digests: Planned once.
    """

    slices: list[int] = field(default_factory=list)
    num_layers: int = 0
    num_missing: int = 0
    digests: DigestPlan | None = None


@dataclass(slots=True)
class _Layer:
    """One module that has parameters in the plan."""

    module: nn.Module
    is_reloaded: bool
    share: _Share | None = None
    slices: list[int] = field(default_factory=list)
    fills: list[int] = field(default_factory=list)
    num_elements: int = 0
    num_missing: int = 0
    is_open: bool = False


class ParameterSink:
    """Takes pieces of slices in any order. Of a layer that must be held twice, only those under way are.

    A layer that keeps its layout is written where it lies, and digested as soon as it and its neighbours are complete,
    while others are still on their way. A layer whose layout vLLM changes gets fresh parameters, is digested once they
    are complete, and is then processed by vLLM into its former storage: what its kernels hold afterwards cannot be read
    back (on CPUs the weight is packed and dropped).

    For each publish: `begin`; for each piece `room`, then `place` once it is there; `finish`. `close` in `finally`.

    Args:
        model: The worker's.
        plan: The worker's.
        device: Where its parameters lie.
        resolve: Gives the tensor that a target of the plan names; None where targets are the model's own parameters.
            What comes before the last dot of a target's name is a module of the model in any case.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SlicePlan,
        device: torch.device,
        resolve: Callable[[str], torch.Tensor] | None = None,
    ) -> None:
        self._plan = plan
        self._device = device
        self._resolve = resolve or self._parameter
        self._layers = _group_by_layer(model, plan)
        self._tied = _tied_copies(model, self._layers)
        self._digests = torch.zeros(len(plan.slices), dtype=torch.int64, device=device)
        self._beside = SideStream(device)
        self._shares = _shares_of(plan, self._layers)
        self._wants_digests = True

    def begin(self, *, with_digests: bool = True) -> None:
        """Expect every slice of the plan.

        Args:
            with_digests: Or else, that nobody wants them: `finish` returns zeros.
        """
        self.close()
        self._wants_digests = with_digests
        self._beside.join()
        self._digests.zero_()
        for layer in self._layers.values():
            layer.num_missing = layer.num_elements
        for share in self._shares:
            share.num_missing = share.num_layers

    @torch.no_grad()
    def room(self, message: Message) -> torch.Tensor:
        """Return a contiguous tensor that the piece is to arrive in: its own place where that is contiguous."""
        piece = self._plan.slices[message.slice_index]
        self._open(self._layer(piece.target))
        parameter = self._resolve(piece.target)
        if dtype_name(parameter.dtype) != piece.dtype:
            raise RuntimeError(f"{piece.target} is {parameter.dtype}, but the plan says {piece.dtype}")
        place = message.target.view(parameter)
        return place if place.is_contiguous() else torch.empty(place.shape, dtype=place.dtype, device=self._device)

    def stays(self, message: Message, room: torch.Tensor) -> bool:
        """Whether `room` returns the same tensor for this piece in every publish."""
        target = self._plan.slices[message.slice_index].target
        place = message.target.view(self._resolve(target))
        return not self._layer(target).is_reloaded and place.data_ptr() == room.data_ptr()

    @torch.no_grad()
    def place(self, message: Message, value: torch.Tensor) -> None:
        """Take a piece that has arrived in what `room` returned."""
        place = message.target.view(self._resolve(self._plan.slices[message.slice_index].target))
        if place.data_ptr() != value.data_ptr():
            place.copy_(value)

    def held(self, message: Message) -> torch.Tensor:
        """Return what lies where the piece was put, contiguous."""
        return message.target.view(self._resolve(self._plan.slices[message.slice_index].target)).contiguous()

    def settle(self, message: Message) -> None:
        """Count a piece that was placed; what is complete is digested, and a reloaded layer processed."""
        layer = self._layer(self._plan.slices[message.slice_index].target)
        layer.num_missing -= message.source.num_elements
        if layer.num_missing == 0:
            self._complete(layer)

    @torch.no_grad()
    def finish(self) -> list[int]:
        """Return one digest for each slice of the plan, in its order, of what this worker now holds.

        Raises:
            RuntimeError: Not every parameter of the plan was written.
        """
        if missing := [prefix for prefix, layer in self._layers.items() if layer.num_missing]:
            raise RuntimeError(f"{self._plan.worker}: the publish ended without weights for {missing[:5]}")
        for layer in self._layers.values():
            if layer.num_elements == 0:  # nothing but padding, such as the last part of a vocabulary
                self._open(layer)
                self._complete(layer)
        for module in self._tied:
            vllm_compat.process_again(module)
        self._beside.join()
        return unsigned(self._digests)

    def close(self) -> None:
        """Give layers that are still open their former parameters back. Harmless after `finish`."""
        for layer in self._layers.values():
            if layer.is_open:
                vllm_compat.abandon(layer.module)
                layer.is_open = False

    @staticmethod
    def _open(layer: _Layer) -> None:
        if layer.is_reloaded and not layer.is_open:
            vllm_compat.open_for_loading(layer.module)
            layer.is_open = True

    @torch.no_grad()
    def _complete(self, layer: _Layer) -> None:
        for index in layer.fills:
            fill = self._plan.fills[index]
            fill.target_region.view(self._resolve(fill.target)).fill_(fill.value)
        if layer.is_reloaded:
            if self._wants_digests:
                found = digests(self._runs(layer.slices), len(self._plan.slices), self._device)
                self._beside.join()  # it adds to the same numbers
                self._digests += found
            vllm_compat.process_and_close(layer.module)
            layer.is_open = False
        if layer.share is not None:
            layer.share.num_missing -= 1
            if layer.share.num_missing == 0:
                self._digest(layer.share)

    def _digest(self, share: _Share) -> None:
        if not self._wants_digests:
            return
        with self._beside.after_current():
            if share.digests is None:
                share.digests = DigestPlan(self._runs(share.slices), len(self._plan.slices), self._device)
            share.digests.add_to(self._digests)

    def _runs(self, slices: Iterable[int]) -> list[Run]:
        pieces = [(index, self._plan.slices[index]) for index in slices]
        return [Run(piece.target_region.view(self._resolve(piece.target)), 0, index) for index, piece in pieces]

    def _layer(self, target: str) -> _Layer:
        return self._layers[_split(target)[0]]

    def _parameter(self, target: str) -> torch.Tensor:
        # Asked for anew each time: a layer that is being loaded has other parameters for a while.
        value = getattr(self._layer(target).module, _split(target)[1])
        assert isinstance(value, torch.Tensor)
        return value.data


def _split(name: str) -> tuple[str, str]:
    prefix, _, local = name.rpartition(".")
    return prefix, local


def _group_by_layer(model: nn.Module, plan: SlicePlan) -> dict[str, _Layer]:
    reloaded = {_split(name)[0] for name in plan.reloaded}
    layers: dict[str, _Layer] = {}

    def layer_of(target: str) -> _Layer:
        prefix = _split(target)[0]
        if prefix not in layers:
            layers[prefix] = _Layer(module=model.get_submodule(prefix), is_reloaded=prefix in reloaded)
        return layers[prefix]

    for index, piece in enumerate(plan.slices):
        layer = layer_of(piece.target)
        layer.slices.append(index)
        layer.num_elements += piece.source_region.num_elements
    for index, fill in enumerate(plan.fills):
        layer_of(fill.target).fills.append(index)
    return layers


def _shares_of(plan: SlicePlan, layers: Mapping[str, _Layer]) -> list[_Share]:
    """Divide the layers that keep their layout, in the order in which they arrive."""
    shares: list[_Share] = []
    room = 0
    for layer in layers.values():
        if layer.is_reloaded or layer.num_elements == 0:
            continue
        pieces = [plan.slices[index] for index in layer.slices]
        size = sum(piece.source_region.num_elements * dtype_from_name(piece.dtype).itemsize for piece in pieces)
        if not shares or size > room:
            shares.append(_Share())
            room = _BYTES_PER_DIGEST
        room -= size
        layer.share = shares[-1]
        layer.share.slices += layer.slices
        layer.share.num_layers += 1
    return shares


def _tied_copies(model: nn.Module, layers: Mapping[str, _Layer]) -> list[nn.Module]:
    """List layers that share a parameter with a written one: a tied `lm_head` keeps its own packed copy."""
    written = {id(value) for layer in layers.values() for value in vllm_compat.layer_parameters(layer.module).values()}
    targets = {id(layer.module) for layer in layers.values()}
    return [
        module
        for module in model.modules()
        if id(module) not in targets
        and not vllm_compat.keeps_layout(module)
        and any(id(value) in written for value in vllm_compat.layer_parameters(module).values())
    ]
