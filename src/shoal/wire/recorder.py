"""Follow named tensors through code that slices, reshapes and copies them: which part of which one is this?

Both ends need it: a worker to learn what vLLM's loader does with a checkpoint's parameters, the trainer to learn how
its parameters in memory appear in a checkpoint. Run on meta tensors it touches no data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.wire.plan import Region

_aten = torch.ops.aten
_COPIES = (_aten.clone.default, _aten._to_copy.default)


class OriginRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows of every tensor, while it is active, which region of which source it shows, if of any.

    Args:
        sources: By name; each alone in its storage, and contiguous.
    """

    def __init__(self, sources: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources = {storage_key(tensor): name for name, tensor in sources.items()}
        # Whole copies of a source view (a cast, a `contiguous()`): the view they came from and their own geometry.
        self._copies: dict[int, tuple[str, Region, Region]] = {}
        self._keep: list[torch.Tensor] = []  # a freed storage's address could be used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in written(func, args, kwargs):
            # It holds something else now.
            self._sources.pop(storage_key(value), None)
            self._copies.pop(storage_key(value), None)
        result = func(*args, **kwargs)
        if func in _COPIES and (origin := self.origin(args[0])) is not None:
            self._copies[storage_key(result)] = (*origin, Region.of(result))
            self._keep.append(result)
        return result

    def origin(self, value: torch.Tensor) -> tuple[str, Region] | None:
        """Return the source and the region of it that `value` shows; `None` if it is computed."""
        key = storage_key(value)
        if (name := self._sources.get(key)) is not None:
            return name, Region.of(value)
        if key in self._copies:
            name, copied, geometry = self._copies[key]
            region = _through_copy(Region.of(value), copied, geometry)
            return None if region is None else (name, region)
        return None


def storage_key(tensor: torch.Tensor) -> int:
    """Return what is equal for two tensors that share their memory, for as long as one of them lives."""
    return int(tensor.untyped_storage()._cdata)


def written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """Yield the arguments that an operator changes."""
    if not func._schema.is_mutable:
        return
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        value = given.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
            yield value


def _through_copy(view: Region, copied: Region, geometry: Region) -> Region | None:
    """Return the region of the source that a view of a copy shows: the copy's strides replaced by the source's.

    A stride of the view is a sum of steps along the copy's dimensions. If no step leaves the copy's dimension, the same
    steps along the source's dimensions lead to the same elements; a view that flattens dimensions is not understood.
    """
    last = _unravel(view.offset - geometry.offset, geometry)
    offset = copied.offset + _dot(last, copied.strides)
    strides = []
    for size, stride in zip(view.shape, view.strides, strict=True):
        steps = _unravel(stride, geometry) if size > 1 else [0] * len(geometry.shape)
        last = [position + step * (size - 1) for position, step in zip(last, steps, strict=True)]
        strides.append(_dot(steps, copied.strides))
    if any(position >= size for position, size in zip(last, geometry.shape, strict=True)):
        return None
    return Region(offset=offset, shape=view.shape, strides=tuple(strides))


def _unravel(distance: int, geometry: Region) -> list[int]:
    """Split a distance in memory into steps along each dimension, the widest first."""
    steps = [0] * len(geometry.shape)
    for index in sorted(range(len(steps)), key=lambda index: -geometry.strides[index]):
        if geometry.shape[index] > 1 and geometry.strides[index] > 0:
            steps[index], distance = divmod(distance, geometry.strides[index])
    return steps


def _dot(steps: list[int], strides: tuple[int, ...]) -> int:
    return sum(step * stride for step, stride in zip(steps, strides, strict=True))
