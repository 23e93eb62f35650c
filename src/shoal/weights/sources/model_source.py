"""All weights of a model, as its checkpoint has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from shoal.errors import ConfigError
from shoal.types import Interval, ParameterMeta
from shoal.weights.sources.layout import Entry, learn_layout
from shoal.weights.sources.shards import Value
from shoal.weights.sources.variables import Variables, core_model
from shoal.wire.plan import dtype_name


class ModelSource:
    """What this rank holds of a model's weights, under the names and in the shapes of its checkpoint.

    Parameters go out as they lie, without a copy. Scratch is needed for one parameter at a time: one that is merged
    with its adapter or dequantised, or one of a sharded model that the checkpoint has in another order (transposed),
    which is gathered. The next one is made when it is asked for.

    Args:
        model: See `make_source`.
        wire_dtype: See `make_source`.
        merges_adapters: See `make_source`.

    Raises:
        ConfigError: See `make_source`.
    """

    def __init__(
        self, model: nn.Module, *, wire_dtype: torch.dtype | None = None, merges_adapters: bool = True
    ) -> None:
        core = core_model(model)
        self._variables = Variables(core, wire_dtype, merges=merges_adapters)
        values = self._variables.values()
        self._layout = learn_layout(
            core,
            {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in values.items()},
        )
        self._metadata = tuple(
            ParameterMeta(name=entry.name, dtype=dtype_name(value.dtype), shape=entry.region.shape)
            for name, value in values.items()
            for entry in self._layout[name]
        )
        self._held = {
            entry.name: held
            for name, value in values.items()
            for entry in self._layout[name]
            if (held := _held(entry, value)).size > 0
        }
        self._in_place = frozenset(
            entry.name
            for name, value in values.items()
            if value.is_in_place and _are_runs(self._layout[name])
            for entry in self._layout[name]
        )

        self._views: dict[str, tuple[Value, tuple[tuple[str, torch.Tensor], ...]]] = {}

    def in_place(self) -> frozenset[str]:
        """Name the parameters that go out as they lie."""
        return self._in_place

    def metadata(self) -> tuple[ParameterMeta, ...]:
        """Describe every parameter of the checkpoint in full."""
        return self._metadata

    def held(self) -> Mapping[str, Interval]:
        """Return which elements of each parameter this rank has."""
        return self._held

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the current values of what `held` names, flat.

        Raises:
            ConfigError: The model has other parameters than when the source was made.
        """
        # The model is looked at anew: adapters can be switched, and FSDP2 exchanges parameter objects.
        values = self._variables.values()
        if values.keys() != self._layout.keys():
            changed = sorted(values.keys() ^ self._layout.keys())
            raise ConfigError(f"the model has changed since the engines were told of it: {changed[0]}")
        # In the order of `metadata`: PEFT reorders a layer's parameters when it computes with adapted ones.
        for name, entries in self._layout.items():
            value = values[name]
            if not (value.is_in_place and _are_runs(entries)):
                yield from _pieces(value, entries)
                continue
            known = self._views.get(name)
            if known is None or known[0] is not value:
                known = self._views[name] = value, tuple(_pieces(value, entries))
            yield from known[1]


def _held(entry: Entry, value: Value) -> Interval:
    """Return which elements of a checkpoint's parameter come from what this rank holds of the one in memory."""
    region = entry.region
    if not entry.is_run:
        return Interval(0, region.num_elements)
    inside = value.interval.overlap(Interval(region.offset, region.offset + region.num_elements))
    return Interval(inside.start - region.offset, inside.stop - region.offset)


def _are_runs(entries: tuple[Entry, ...]) -> bool:
    """Whether the checkpoint's parameters in one in memory are runs of its elements, so that nothing is gathered."""
    return all(entry.is_run for entry in entries)


@torch.no_grad()
def _pieces(value: Value, entries: tuple[Entry, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    if _are_runs(entries):
        local = value.local()
        for entry in entries:
            held = _held(entry, value)
            start = entry.region.offset + held.start - value.interval.start
            yield entry.name, local[start : start + held.size] if held.size > 0 else local[:0]
        return
    whole = value.whole().contiguous()
    for entry in entries:
        yield entry.name, entry.region.view(whole).reshape(-1)
