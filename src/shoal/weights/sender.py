"""What one trainer rank does in a publish: send its pieces of every parameter, and digest them."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from shoal.protocols import Parcel, Pending, WeightSource, WeightTransport
from shoal.types import Interval
from shoal.wire.agreement import Verify
from shoal.wire.digest import RepeatedDigests, Run
from shoal.wire.liveness import GoneError, LateError, patience_left
from shoal.wire.plan import Region, Slice, SlicePlan, dtype_from_name
from shoal.wire.schedule import Holdings, Ownership, Part, assign, batches, messages, num_ahead, run_within


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
class Loss:
    """Why an engine could not be sent to.

    Attributes:
        reason: For people.
        members: Which members of its group it was that did not come along, where that is known.
    """

    reason: str
    members: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SendReport:
    """What came of sending.

    Attributes:
        digests: `[pieces]` int64, this rank's share of each piece's digest, in the order of `WeightSender.pieces`;
            zeros with `verify="off"`.
        lost: Engines that could not be sent to, and why.
        mismatches: With `verify="full"`: for each engine, pieces that came back different.
        num_bytes: Sent, over all engines.
    """

    digests: torch.Tensor
    lost: Mapping[str, Loss]
    mismatches: Mapping[str, tuple[str, ...]]
    num_bytes: int


@dataclass(slots=True)
class _Batch:
    """What this rank does for one batch; made once.

    Attributes:
        names: Parameters of the batch.
        is_in_place: Whether its tensors are views of the parameters, as far as was seen.
        loads: Tensors to be made: a region of a parameter in a type.
        parcels: For each line, which of them go to which member of its group.
        runs: Which of them are digested: beginning with which element of what.
        digests: Computes these, unless the batch is in place.
    """

    names: tuple[str, ...]
    is_in_place: bool = False
    loads: list[Piece] = field(default_factory=list)
    parcels: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    digests: RepeatedDigests | None = None


class WeightSender:
    """Sends one source to all lines, one batch ahead of the wire.

    The tensors under way are views of the parameters wherever the engine keeps them in the trainer's type and the
    piece is contiguous; else they are scratch, of at most two batches. Of the former many batches go at once.

    Args:
        source: This rank's part of the weights.
        rank: This trainer rank.
        holdings: What each rank holds.
        lines: To all engines.
        plans: For each line, its workers' slice plans.
        device: That the transports carry tensors of.
        batch_bytes: Bound on one batch.
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        rank: int,
        holdings: Sequence[Holdings],
        lines: Sequence[Line],
        plans: Sequence[Sequence[SlicePlan]],
        device: torch.device,
        batch_bytes: int,
    ) -> None:
        self._source = source
        self._rank = rank
        self._holdings = holdings
        self._lines = tuple(lines)
        self._plans = tuple(plans)
        self._device = device
        self._batch_bytes = batch_bytes
        self._held = holdings[rank]
        self._names_in_place = source.in_place()
        self.pieces, self._batches = _schedule(source, rank, holdings, lines, plans, batch_bytes)
        self._in_place_digests = RepeatedDigests(len(self.pieces), device)
        numbers = {piece: number for number, piece in enumerate(self.pieces)}
        self.slots = {
            plan.worker: tuple(numbers[piece_of(item)] for item in plan.slices) for workers in plans for plan in workers
        }
        """For each worker, which of `pieces` each slice of its plan is."""

    @property
    def wanted(self) -> frozenset[str]:
        """Parameters that engines take something of."""
        return frozenset(piece.source for piece in self.pieces)

    def with_line(self, index: int, line: Line, workers: Sequence[SlicePlan]) -> WeightSender:
        """Return a sender like this one in which another engine has taken the place of one."""
        return WeightSender(
            self._source,
            rank=self._rank,
            holdings=self._holdings,
            lines=(*self._lines[:index], line, *self._lines[index + 1 :]),
            plans=(*self._plans[:index], workers, *self._plans[index + 1 :]),
            device=self._device,
            batch_bytes=self._batch_bytes,
        )

    @torch.no_grad()
    def send(self, lines: Sequence[int], *, timeout_s: float, verify: Verify) -> SendReport:
        """Send the current weights; an engine that fails is left out from then on. A collective where `source` is one.

        Args:
            lines: Which engines take part.
            timeout_s: For an engine to take what is under way.
            verify: Whether to digest what is sent, and whether to compare bit for bit what the engines then hold.
        """
        return _Sending(self, lines, timeout_s, verify).run()

    def loaded(self) -> Iterator[tuple[_Batch, list[torch.Tensor]]]:
        """Go through the source; yield each batch with its tensors."""
        stream = self._source.tensors()
        values: dict[str, torch.Tensor] = {}
        for batch in self._batches:
            values = {name: value for name, value in values.items() if name == batch.names[0]}
            wanted = batch.names[-1]
            while wanted not in values:
                name, value = next(stream)
                values[name] = value
            tensors = [self._load(load, values[load.source]) for load in batch.loads]
            batch.is_in_place = batch.is_in_place or self._lie_still(batch, tensors, values)
            yield batch, tensors
        # To the end: what follows the last parameter that an engine wants may be a collective.
        for _ in stream:
            pass

    def _lie_still(self, batch: _Batch, tensors: Sequence[torch.Tensor], values: Mapping[str, torch.Tensor]) -> bool:
        return self._names_in_place.issuperset(batch.names) and all(
            tensor.numel() == 0 or _address(tensor) == _address(values[load.source])
            for load, tensor in zip(batch.loads, tensors, strict=True)
        )

    def _load(self, load: Piece, held: torch.Tensor) -> torch.Tensor:
        view = load.region.view(held, first=self._held[load.source].start)
        return view.to(self._device, dtype_from_name(load.dtype)).contiguous()


class _Sending:
    """One publish of one sender."""

    def __init__(self, sender: WeightSender, lines: Sequence[int], timeout_s: float, verify: Verify) -> None:
        self._sender = sender
        self._live = list(lines)
        self._timeout_s = timeout_s
        self._verify = verify
        self._lost: dict[str, Loss] = {}
        self._mismatches: dict[str, tuple[str, ...]] = {}
        self._num_bytes = 0

    def run(self) -> SendReport:
        sender = self._sender
        shares = torch.zeros(len(sender.pieces), dtype=torch.int64, device=sender._device)
        under_way: deque[tuple[_Batch, list[torch.Tensor], dict[int, Pending]]] = deque()
        in_place: list[Run] = []
        for batch, tensors in sender.loaded():
            pending = self._post(batch, tensors)
            if self._verify != "off":
                runs = [Run(tensors[load], start, slot) for load, start, slot in batch.runs]
                if batch.is_in_place:
                    in_place += runs  # a digest now would hold up what is to carry the next batch
                else:
                    if batch.digests is None:
                        batch.digests = RepeatedDigests(len(sender.pieces), sender._device)
                    shares += batch.digests.compute(runs)
            under_way.append((batch, tensors, pending))
            while len(under_way) > num_ahead(in_place=batch.is_in_place, goes_back=self._verify == "full"):
                self._settle(*under_way.popleft())
        if in_place:
            shares += sender._in_place_digests.compute(in_place)
        for sent in under_way:
            self._settle(*sent)
        last_sent = time.monotonic()
        for index in tuple(self._live):
            self._guarded(index, lambda line: line.transport.finish(patience_left(last_sent, self._timeout_s)))
        return SendReport(digests=shares.cpu(), lost=self._lost, mismatches=self._mismatches, num_bytes=self._num_bytes)

    def _post(self, batch: _Batch, tensors: list[torch.Tensor]) -> dict[int, Pending]:
        pending: dict[int, Pending] = {}
        for index in tuple(self._live):
            parcels = [
                Parcel(tensors[load], member, stays=batch.is_in_place) for load, member in batch.parcels.get(index, ())
            ]
            if not parcels:
                continue
            self._num_bytes += sum(parcel.tensor.nbytes for parcel in parcels)

            def post(line: Line, index: int = index, parcels: list[Parcel] = parcels) -> None:
                pending[index] = line.transport.send(parcels)

            self._guarded(index, post)
        return pending

    def _settle(self, batch: _Batch, tensors: list[torch.Tensor], pending: dict[int, Pending]) -> None:
        """Wait until a batch is sent, so that its scratch can be used again; compare what comes back, if asked to."""
        for index, sent in pending.items():
            if index in self._live:
                self._guarded(index, lambda line, sent=sent: sent.wait())  # type: ignore[misc]
            if index in self._live and self._verify == "full":
                self._guarded(index, lambda line, index=index: self._compare(line, batch, tensors, index))  # type: ignore[misc]

    def _compare(self, line: Line, batch: _Batch, tensors: list[torch.Tensor], index: int) -> None:
        parcels = batch.parcels[index]
        echoes = [Parcel(torch.empty_like(tensors[load]), member) for load, member in parcels]
        line.transport.receive(echoes).wait()
        for (load, _), echo in zip(parcels, echoes, strict=True):
            if not torch.equal(_bits(echo.tensor), _bits(tensors[load])):
                known = self._mismatches.get(line.name, ())
                self._mismatches[line.name] = (*known, batch.loads[load].source)

    def _guarded(self, index: int, action: Callable[[Line], None]) -> None:
        """Do something with one line; if that fails, go on without it."""
        line = self._sender._lines[index]
        try:
            action(line)
        except Exception as error:
            members = error.members if isinstance(error, (LateError, GoneError)) else ()
            self._lost[line.name] = Loss(f"{type(error).__name__}: {error}", members)
            self._live.remove(index)
            line.close()


def _schedule(
    source: WeightSource,
    rank: int,
    holdings: Sequence[Holdings],
    lines: Sequence[Line],
    plans: Sequence[Sequence[SlicePlan]],
    batch_bytes: int,
) -> tuple[tuple[Piece, ...], list[_Batch]]:
    """Work out what this rank loads, sends and digests, batch by batch."""
    parameters = source.metadata()
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
        batch = _Batch(names=tuple(part.name for part in parts))
        loads: dict[Piece, int] = {}

        def load(piece: Piece, batch: _Batch = batch, loads: dict[Piece, int] = loads) -> int:
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


def _address(value: torch.Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1).view(torch.uint8)
