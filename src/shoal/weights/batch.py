"""What one trainer rank does for each batch of a publish: drawn up once, and made of the current weights each time."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from shoal.protocols import Parcel, WeightSource, WeightTransport
from shoal.types import Interval
from shoal.wire.digest import RepeatedDigests, Run
from shoal.wire.plan import Region, Slice, SlicePlan
from shoal.wire.schedule import Holdings, Ownership, Part, assign, batches, messages, run_within


@dataclass(frozen=True, slots=True)
class Piece:
    """A region of a parameter in an engine's type: what one digest is about."""

    source: str
    region: Region
    dtype: str


def piece_of(item: Slice) -> Piece:
    """Return what a slice of a plan is filled with."""
    return Piece(item.source, item.source_region, item.dtype)


class Line(Protocol):
    """What a sender needs of the line to one engine."""

    @property
    def name(self) -> str:
        """Of the engine."""
        ...

    @property
    def transport(self) -> WeightTransport:
        """What carries tensors to it."""
        ...

    @property
    def preferred(self) -> Sequence[frozenset[int]]:
        """For each worker, the ranks that send whatever they hold."""
        ...

    def close(self) -> None:
        """Leave it."""
        ...

    def member(self, worker: int) -> int:
        """Return a worker's number in the transport's group."""
        ...


@dataclass(frozen=True, slots=True)
class Contents:
    """A batch made of the current weights.

    Attributes:
        values: Of the parameters, as the source gave them.
        tensors: What is sent.
        parcels: The same, by line.
        runs: What is digested.
        is_in_place: Whether all of it lies in the parameters themselves.
    """

    values: tuple[torch.Tensor, ...]
    tensors: Sequence[torch.Tensor]
    parcels: Mapping[int, Sequence[Parcel]]
    runs: Sequence[Run]
    is_in_place: bool


@dataclass(slots=True)
class Batch:
    """What a rank does for one batch.

    Attributes:
        names: Parameters of the batch.
        is_of_views: Whether the source gives all of them where they lie.
        loads: Tensors to be made: a region of a parameter in a type.
        parcels: For each line, which of them go to which member of its group.
        runs: Which of them are digested: beginning with which element of what.
        digests: Computes these, unless the contents lie in place.
    """

    names: tuple[str, ...]
    is_of_views: bool
    loads: list[Piece] = field(default_factory=list)
    parcels: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    digests: RepeatedDigests | None = None
    _last: Contents | None = None

    def contents(self, values: Sequence[torch.Tensor], load: Callable[[Piece, torch.Tensor], torch.Tensor]) -> Contents:
        """Return the batch made of `values`; the same object for the same tensors, where all of it lies in them.

        Args:
            values: Of `names`.
            load: Makes a tensor that is sent of a parameter's value.
        """
        last = self._last
        if last is not None and all(map(operator.is_, values, last.values)):
            return last
        by_name = dict(zip(self.names, values, strict=True))
        tensors = [load(piece, by_name[piece.source]) for piece in self.loads]
        is_in_place = self.is_of_views and all(
            tensor.numel() == 0 or _memory(tensor) == _memory(by_name[piece.source])
            for piece, tensor in zip(self.loads, tensors, strict=True)
        )
        found = Contents(
            values=tuple(values),
            tensors=tensors,
            parcels={
                line: [Parcel(tensors[index], member, stays=is_in_place) for index, member in pairs]
                for line, pairs in self.parcels.items()
            },
            runs=[Run(tensors[index], start, slot) for index, start, slot in self.runs],
            is_in_place=is_in_place,
        )
        self._last = found if is_in_place else None
        return found


def draw_batches(
    source: WeightSource,
    rank: int,
    holdings: Sequence[Holdings],
    lines: Sequence[Line],
    plans: Sequence[Sequence[SlicePlan]],
    batch_bytes: int,
) -> tuple[tuple[Piece, ...], list[Batch]]:
    """Work out what this rank loads, sends and digests, batch by batch."""
    parameters, views = source.metadata(), source.in_place()
    slots: dict[Piece, int] = {}
    by_source: dict[str, list[Piece]] = defaultdict(list)
    for item in (item for workers in plans for plan in workers for item in plan.slices):
        piece = piece_of(item)
        if piece not in slots:
            slots[piece] = len(slots)
            by_source[piece.source].append(piece)
    own = assign(parameters, holdings)
    owners: dict[frozenset[int], Ownership] = {}
    done = []
    for parts in batches([meta for meta in parameters if meta.name in by_source], batch_bytes):
        names = tuple(part.name for part in parts)
        batch = Batch(names=names, is_of_views=views.issuperset(names))
        loads: dict[Piece, int] = {}

        def load(piece: Piece, batch: Batch = batch, loads: dict[Piece, int] = loads) -> int:
            if piece not in loads:
                loads[piece] = len(batch.loads)
                batch.loads.append(piece)
            return loads[piece]

        for part in parts:
            for piece in by_source[part.name]:
                for start, box in _own_boxes(piece, own, part, rank):
                    batch.runs.append((load(Piece(piece.source, box, piece.dtype)), start, slots[piece]))
            for index, line in enumerate(lines):
                for worker, plan in enumerate(plans[index]):
                    preferred = line.preferred[worker]
                    if preferred not in owners:
                        owners[preferred] = assign(parameters, holdings, preferred)
                    for message in messages(plan, owners[preferred], part):
                        if message.rank == rank:
                            piece = Piece(part.name, message.source, plan.slices[message.slice_index].dtype)
                            batch.parcels[index].append((load(piece), line.member(worker)))
        done.append(batch)
    return tuple(slots), done


def _own_boxes(piece: Piece, own: Ownership, part: Part, rank: int) -> Iterator[tuple[int, Region]]:
    """Yield the boxes of a piece whose digest is this rank's to add, each with the number of its first element."""
    for segment in own[part.name]:
        if segment.rank == rank:
            run: Interval = run_within(piece.region, segment.interval.overlap(part.interval), part.name)
            start = run.start
            for box in piece.region.boxes(run.start, run.stop):
                yield start, box
                start += box.num_elements


def _memory(value: torch.Tensor) -> int:
    return value.untyped_storage().data_ptr()
