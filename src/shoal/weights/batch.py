"""What one trainer rank does for each batch of a publish: drawn up once, and made of the current weights each time."""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from shoal.protocols import Parcel, WeightSource, WeightTransport
from shoal.types import Interval
from shoal.wire.digest import RepeatedDigests, Run
from shoal.wire.plan import Region, Slice, SlicePlan, dtype_from_name
from shoal.wire.schedule import Holdings, Ownership, Part, assign, batches, messages, run_within

_ALIGNMENT = 256


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


class _Half:
    """One half of a scratch; the memory is there once something is put into it."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._num_bytes = num_bytes
        self._device = device
        self._memory: torch.Tensor | None = None

    def rooms(self, views: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
        """Return contiguous tensors of these shapes and types, one after the other from its beginning."""
        if self._memory is None:
            self._memory = torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device)
        rooms, offset = [], 0
        for view, dtype in zip(views, dtypes, strict=True):
            num_bytes = view.numel() * dtype.itemsize
            rooms.append(self._memory[offset : offset + num_bytes].view(dtype).view(view.shape))
            offset += _aligned(num_bytes)
        return rooms


class Scratch:
    """Memory for what is not sent from where it lies: two halves, filled in turn, which stay from publish to publish.

    Args:
        num_bytes: Of each half.
        device: Where it is.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.device = device
        self._turns = itertools.cycle([_Half(num_bytes, device), _Half(num_bytes, device)])

    def take(self) -> _Half:
        """Return the half whose turn it is."""
        return next(self._turns)


@dataclass(frozen=True, slots=True)
class Contents:
    """A batch made of the current weights.

    Attributes:
        values: Of the parameters, as the source gave them.
        tensors: What is sent.
        parcels: The same, by line.
        runs: What is digested.
        half: Of the scratch, where some of it has to be copied there first.
        copies: To where there, and of what.
        is_kept: Whether it takes no memory that is not kept anyway.
    """

    values: tuple[torch.Tensor, ...]
    tensors: Sequence[torch.Tensor]
    parcels: Mapping[int, Sequence[Parcel]]
    runs: Sequence[Run]
    half: _Half | None
    copies: tuple[list[torch.Tensor], list[torch.Tensor]]
    is_kept: bool

    @property
    def is_in_place(self) -> bool:
        """Whether all of it lies in the parameters themselves."""
        return self.is_kept and self.half is None

    def fill(self) -> None:
        """Copy to the scratch, whose half must be free."""
        if self.half is not None:
            torch._foreach_copy_(*self.copies)


@dataclass(slots=True)
class Batch:
    """What a rank does for one batch.

    Attributes:
        names: Parameters of the batch.
        views: Those that the source gives where they lie.
        loads: Tensors to be made: a region of a parameter in a type.
        parcels: For each line, which of them go to which member of its group.
        runs: Which of them are digested: beginning with which element of what.
        digests: Computes these, unless the contents lie in place.
    """

    names: tuple[str, ...]
    views: frozenset[str]
    loads: list[Piece] = field(default_factory=list)
    parcels: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    digests: RepeatedDigests | None = None
    _last: Contents | None = None

    @property
    def scratch_bytes(self) -> int:
        """What it takes if nothing can be sent from where it lies."""
        sizes = (piece.region.num_elements * dtype_from_name(piece.dtype).itemsize for piece in self.loads)
        return sum(map(_aligned, sizes))

    def contents(self, values: Sequence[torch.Tensor], held: Holdings, scratch: Scratch) -> Contents:
        """Return the batch made of `values`, not filled yet. It is the same as the last time if all of them lie still.

        Args:
            values: Of `names`.
            held: What this rank has of each.
            scratch: For what cannot be sent from where it lies.
        """
        last = self._last
        if last is not None and all(map(operator.is_, values, last.values)):
            return last
        by_name = dict(zip(self.names, values, strict=True))
        views = [piece.region.view(by_name[piece.source], first=held[piece.source].start) for piece in self.loads]
        dtypes = [dtype_from_name(piece.dtype) for piece in self.loads]
        moved = [
            index
            for index, (view, dtype) in enumerate(zip(views, dtypes, strict=True))
            if not (view.dtype == dtype and view.device == scratch.device and view.is_contiguous())
        ]
        half = scratch.take() if moved else None
        sources = [views[index] for index in moved]
        rooms = half.rooms(sources, [dtypes[index] for index in moved]) if half is not None else []
        tensors, stays = list(views), [piece.source in self.views for piece in self.loads]
        for index, room in zip(moved, rooms, strict=True):
            tensors[index], stays[index] = room, True
        found = Contents(
            values=tuple(values),
            tensors=tensors,
            parcels={
                line: [Parcel(tensors[index], member, stays=stays[index]) for index, member in pairs]
                for line, pairs in self.parcels.items()
            },
            runs=[Run(tensors[index], start, slot) for index, start, slot in self.runs],
            half=half,
            copies=(rooms, sources),
            is_kept=all(stays),
        )
        self._last = found if found.is_kept and self.views.issuperset(self.names) else None
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
        batch = Batch(names=names, views=views.intersection(names))
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


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
