"""The slice plan: which part of which checkpoint parameter lands in which part of an engine's own parameter."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from shoal.types import ParameterMeta


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A strided view of a contiguous tensor, in elements.

    Attributes:
        offset: Of the first element.
        shape: Sizes.
        strides: One for each size.
    """

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, view: torch.Tensor) -> Region:
        """Describe `view` relative to the storage it lies in."""
        return cls(offset=int(view.storage_offset()), shape=tuple(view.shape), strides=tuple(view.stride()))

    @property
    def num_elements(self) -> int:
        """Number of elements of the view."""
        return math.prod(self.shape)

    def view(self, tensor: torch.Tensor, *, first: int = 0) -> torch.Tensor:
        """Return this region of `tensor`, which may itself lie anywhere in its storage.

        Args:
            tensor: The contiguous tensor, or a run of its elements.
            first: Number of the element that `tensor` begins with.
        """
        return torch.as_strided(tensor, self.shape, self.strides, tensor.storage_offset() + self.offset - first)

    @property
    def is_ordered(self) -> bool:
        """Whether its elements in row-major order are also in the order in which they lie."""
        span = 0
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1:
                if stride <= span:
                    return False
                span += (size - 1) * stride
        return True

    def num_below(self, position: int) -> int:
        """Count the elements of an ordered region that lie before element `position` of the tensor."""
        if not self.shape:
            return int(self.offset < position)
        if self.num_elements == 0 or position <= self.offset:
            return 0
        rows = 0 if self.shape[0] == 1 else min((position - self.offset) // self.strides[0], self.shape[0])
        return rows * self._row_size + (self._row(rows).num_below(position) if rows < self.shape[0] else 0)

    def boxes(self, start: int, stop: int) -> Iterator[Region]:
        """Cut the elements `start` to `stop`, counted in row-major order, into regions, each a run of that order.

        How it is cut depends on the shape alone: two regions of one shape come apart alike.
        """
        if start >= stop:
            return
        if start == 0 and stop == self.num_elements:
            yield self
            return
        first, head = divmod(start, self._row_size)
        last, tail = divmod(stop, self._row_size)
        if first == last:
            yield from self._row(first).boxes(head, tail)
            return
        if head:
            yield from self._row(first).boxes(head, self._row_size)
            first += 1
        if first < last:
            shape = (last - first, *self.shape[1:])
            yield Region(offset=self._row(first).offset, shape=shape, strides=self.strides)
        if tail:
            yield from self._row(last).boxes(0, tail)

    @property
    def _row_size(self) -> int:
        return math.prod(self.shape[1:])

    def _row(self, index: int) -> Region:
        return Region(offset=self.offset + index * self.strides[0], shape=self.shape[1:], strides=self.strides[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One copy: a region of a checkpoint parameter into a region of an engine's parameter.

    Attributes:
        source: Name of the checkpoint's parameter.
        source_region: Which part of it.
        target: Name of the engine's parameter.
        target_region: Which part of that; the same shape as `source_region`.
        dtype: Type of the engine's parameter, such as `"bfloat16"`.
    """

    source: str
    source_region: Region
    target: str
    target_region: Region
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """A region that the engine's loader sets to a constant: the padding of a vocabulary, usually."""

    target: str
    target_region: Region
    value: float


@dataclass(frozen=True, kw_only=True)
class SlicePlan:
    """Everything that one worker does with one full set of checkpoint parameters.

    Attributes:
        worker: Name of the worker, for messages.
        slices: In the order in which the loader made them.
        fills: Constants.
        reloaded: Engine parameters whose layout the engine changes after loading, which therefore go through its own
            reload; the rest are written where they lie.
    """

    worker: str
    slices: tuple[Slice, ...]
    fills: tuple[Fill, ...]
    reloaded: tuple[str, ...]

    @cached_property
    def by_source(self) -> dict[str, tuple[int, ...]]:
        """Indices into `slices` for each source."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, piece in enumerate(self.slices):
            groups[piece.source].append(index)
        return {name: tuple(indices) for name, indices in groups.items()}

    def to_json(self) -> str:
        """Serialise; `from_json` is the inverse."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SlicePlan:
        """Parse what `to_json` wrote.

        Raises:
            ValueError: It is not such a text.
        """
        try:
            data = json.loads(text)
            return cls(
                worker=str(data["worker"]),
                slices=tuple(
                    Slice(
                        source=str(item["source"]),
                        source_region=_region(item["source_region"]),
                        target=str(item["target"]),
                        target_region=_region(item["target_region"]),
                        dtype=str(item["dtype"]),
                    )
                    for item in data["slices"]
                ),
                fills=tuple(
                    Fill(
                        target=str(item["target"]),
                        target_region=_region(item["target_region"]),
                        value=float(item["value"]),
                    )
                    for item in data["fills"]
                ),
                reloaded=tuple(str(name) for name in data["reloaded"]),
            )
        except (KeyError, TypeError, OverflowError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a slice plan: {error!r}") from error


def dtype_name(dtype: torch.dtype) -> str:
    """Return `"bfloat16"` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """Return `torch.bfloat16` for `"bfloat16"`.

    Raises:
        ValueError: Torch has no such type.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a torch dtype")
    return dtype


def metadata_to_json(parameters: Iterable[ParameterMeta]) -> list[list[Any]]:
    """Describe parameters in plain JSON types: `[[name, dtype, [sizes]], ...]`."""
    return [[meta.name, meta.dtype, list(meta.shape)] for meta in parameters]


def metadata_from_json(items: Iterable[Any]) -> tuple[ParameterMeta, ...]:
    """Parse what `metadata_to_json` wrote."""
    return tuple(
        ParameterMeta(name=str(name), dtype=str(dtype), shape=tuple(int(size) for size in shape))
        for name, dtype, shape in items
    )


def _region(data: Any) -> Region:
    return Region(
        offset=int(data["offset"]),
        shape=tuple(int(size) for size in data["shape"]),
        strides=tuple(int(stride) for stride in data["strides"]),
    )
