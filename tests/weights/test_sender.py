"""What one rank sends, to a transport that only takes it: views where they serve, and every digest's share."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from shoal.protocols import Parcel
from shoal.types import Interval, ParameterMeta
from shoal.weights.sender import Loss, SendReport, WeightSender
from shoal.wire.agreement import Verify
from shoal.wire.digest import digest, unsigned
from shoal.wire.plan import Region, Slice, SlicePlan, dtype_from_name, dtype_name

CPU = torch.device("cpu")
TENSORS = {"a": torch.randn(6, 4), "b": torch.randn(8), "c": torch.randn(5, 4), "unused": torch.randn(3)}


@dataclass
class Sent:
    """One batch under way, of those that are. It must not change meanwhile."""

    wire: Wire
    parcels: Sequence[Parcel]

    def __post_init__(self) -> None:
        self.values = [parcel.tensor.clone() for parcel in self.parcels]
        self.wire.num_under_way += 1
        self.wire.most_under_way = max(self.wire.most_under_way, self.wire.num_under_way)

    def wait(self) -> None:
        assert all(torch.equal(parcel.tensor, value) for parcel, value in zip(self.parcels, self.values, strict=True))
        self.wire.num_under_way -= 1


@dataclass
class Wire:
    """A line and its transport: keeps what is sent to each member, and fails after so many parcels.

    A parcel's tensor may be scratch that is used again; its value as it was sent is kept beside it.
    """

    name: str
    preferred: Sequence[frozenset[int]]
    lasts: int = 1000
    sent: list[Parcel] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    is_closed: bool = False
    num_under_way: int = 0
    most_under_way: int = 0

    @property
    def transport(self) -> Wire:
        return self

    def member(self, worker: int) -> int:
        return 10 + worker

    def send(self, parcels: Sequence[Parcel]) -> Sent:
        self.sent += parcels
        self.values += [parcel.tensor.clone() for parcel in parcels]
        if len(self.sent) > self.lasts:
            raise ConnectionError("cut")
        return Sent(self, parcels)

    def receive(self, parcels: Sequence[Parcel]) -> Sent:
        for parcel in parcels:
            parcel.tensor.zero_()
        return Sent(self, parcels)

    def finish(self, timeout_s: float) -> None: ...

    def close(self) -> None:
        self.is_closed = True


class Rows:
    """Source of a half of the rows, or of all."""

    def __init__(self, part: int = 0, num_parts: int = 1, names_in_place: Iterable[str] = ()) -> None:
        self._part, self._num_parts = part, num_parts
        self._names_in_place = frozenset(names_in_place)
        self.yielded: list[str] = []

    def metadata(self) -> tuple[ParameterMeta, ...]:
        return tuple(
            ParameterMeta(name=name, dtype=dtype_name(value.dtype), shape=tuple(value.shape))
            for name, value in TENSORS.items()
        )

    def held(self) -> dict[str, Interval]:
        runs = {}
        for name, value in TENSORS.items():
            row = value[0].numel()
            cuts = [len(value) * part // self._num_parts * row for part in (self._part, self._part + 1)]
            runs[name] = Interval(*cuts)
        return runs

    def in_place(self) -> frozenset[str]:
        return self._names_in_place

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, run in self.held().items():
            yield name, TENSORS[name].flatten()[run.start : run.stop]
            self.yielded.append(name)


def plan(*pieces: tuple[str, torch.Tensor, str]) -> SlicePlan:
    return SlicePlan(
        worker="w",
        slices=tuple(
            Slice(
                source=name,
                source_region=Region.of(view),
                target=f"t{number}",
                target_region=Region.of(torch.empty(view.shape, device="meta")),
                dtype=dtype,
            )
            for number, (name, view, dtype) in enumerate(pieces)
        ),
        fills=(),
        reloaded=(),
    )


ROWS = TENSORS["a"][1:5]
COLUMNS = TENSORS["c"][:, 1:3]
PLAN = plan(("a", ROWS, "float32"), ("b", TENSORS["b"], "bfloat16"), ("c", COLUMNS, "float32"))


def sender_of(
    wires: list[Wire], sources: list[Rows], rank: int = 0, plans: Sequence[SlicePlan] = (PLAN,), batch_bytes: int = 50
) -> WeightSender:
    return WeightSender(
        sources[rank],
        rank=rank,
        holdings=[source.held() for source in sources],
        lines=wires,
        plans=[plans] * len(wires),
        device=CPU,
        batch_bytes=batch_bytes,
    )


def send(sender: WeightSender, num_lines: int = 1, *, verify: Verify = "digest") -> SendReport:
    return sender.send(range(num_lines), timeout_s=60, verify=verify)


def lies_in(tensor: torch.Tensor, whole: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_what_is_contiguous_and_of_the_engines_type_is_sent_from_where_it_lies() -> None:
    wire = Wire("e", [frozenset()])
    send(sender_of([wire], [Rows()], batch_bytes=1 << 20))
    rows, cast, columns = (parcel.tensor for parcel in wire.sent)
    assert lies_in(rows, TENSORS["a"]) and torch.equal(rows, ROWS)
    assert not lies_in(cast, TENSORS["b"]) and torch.equal(cast, TENSORS["b"].bfloat16())
    assert not lies_in(columns, TENSORS["c"]) and torch.equal(columns, COLUMNS) and columns.is_contiguous()


class Still(Rows):
    """Gives the same tensor objects each time, until it is told to give others."""

    def __init__(self) -> None:
        super().__init__(names_in_place=TENSORS)
        self.flat = {name: value.flatten().clone() for name, value in TENSORS.items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.flat["a"][4:] += 1  # as a source that keeps a copy renews it
        yield from self.flat.items()


@pytest.mark.parametrize("expects", [False, True])
def test_what_lies_still_is_sent_as_the_same_parcels_with_its_present_values(
    expects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire, source = Wire("e", [frozenset()]), Still()
    sender = sender_of(
        [wire], [source], plans=(plan(("a", ROWS, "float32"), ("b", TENSORS["b"], "float32")),), batch_bytes=96
    )
    if expects:  # as on a GPU
        monkeypatch.setattr(sender, "expect_in_place", lambda: sender._in_place and sender._in_place[1].compute())
    reports = []
    for _ in range(3):
        reports.append(send(sender))
        assert unsigned(reports[-1].digests) == [digest(source.flat["a"][4:20]), digest(source.flat["b"])]
    first, second, third = (wire.sent[start : start + 2] for start in (0, 2, 4))
    assert all(map(operator.is_, first, second)) and all(map(operator.is_, first, third))
    assert all(parcel.stays for parcel in first)
    source.flat["a"] = source.flat["a"].clone()
    reports.append(send(sender))
    moved, kept = wire.sent[6:]
    assert moved is not first[0] and kept is first[1] and lies_in(moved.tensor, source.flat["a"])
    assert len({unsigned(report.digests)[0] for report in reports}) == 4
    assert unsigned(reports[-1].digests) == [digest(source.flat["a"][4:20]), digest(source.flat["b"])]


def test_what_must_be_copied_goes_through_two_halves_of_memory_that_stay() -> None:
    wire, source = Wire("e", [frozenset()]), Still()
    pieces = [("a", TENSORS["a"], "bfloat16"), ("b", TENSORS["b"], "float32"), ("c", COLUMNS, "float32")]
    sender = sender_of([wire], [source], plans=(plan(*pieces),), batch_bytes=16)
    for _ in range(3):
        send(sender)
    number = len(wire.sent) // 3
    first, second = wire.sent[:number], wire.sent[number : 2 * number]
    assert all(map(operator.is_, first, second)) and all(parcel.stays for parcel in first)
    memories = {
        storage.data_ptr(): storage.nbytes() for parcel in first for storage in [parcel.tensor.untyped_storage()]
    }
    copies = memories.keys() - {value.untyped_storage().data_ptr() for value in source.flat.values()}
    assert [memories[address] for address in copies] == [256, 256]  # one line each: batches have 16 bytes at most


def test_what_the_source_computes_for_sending_does_not_stay() -> None:
    wire = Wire("e", [frozenset()])
    sender = sender_of(
        [wire], [Rows()], plans=(plan(("a", ROWS, "float32"), ("c", COLUMNS, "float32")),), batch_bytes=200
    )
    for _ in range(2):
        send(sender)
    assert [parcel.stays for parcel in wire.sent] == [False, True] * 2  # of columns a copy was made


@pytest.mark.parametrize("batch_bytes", [8, 50, 1 << 20])
def test_the_ranks_shares_add_up_to_the_digest_of_each_piece(batch_bytes: int) -> None:
    sources = [Rows(0, 2), Rows(1, 2)]
    senders = [sender_of([Wire("e", [frozenset()])], sources, rank, batch_bytes=batch_bytes) for rank in range(2)]
    shares = [send(sender).digests for sender in senders]
    wanted = {"a": digest(ROWS), "b": digest(TENSORS["b"].bfloat16()), "c": digest(COLUMNS)}
    assert unsigned(shares[0] + shares[1]) == [wanted[piece.source] for piece in senders[0].pieces]
    assert unsigned(shares[0]) != list(wanted.values())  # the control: one rank's share is not all
    again = [send(sender).digests for sender in senders]
    assert torch.equal(again[0] + again[1], shares[0] + shares[1])


def test_who_shares_a_device_with_the_worker_sends_all_and_the_digest_is_shared_as_ever() -> None:
    sources = [Rows(), Rows()]
    wires = [Wire("e", [frozenset({1})]), Wire("e", [frozenset({1})])]
    senders = [sender_of([wires[rank]], sources, rank) for rank in range(2)]
    reports = [send(sender) for sender in senders]
    assert reports[0].num_bytes == 0 and reports[1].num_bytes == 4 * 16 + 2 * 8 + 4 * 10
    assert all(bool(report.digests.any()) for report in reports)


@pytest.mark.parametrize(
    ("pieces", "names_in_place", "most"),
    [
        ([("a", TENSORS["a"], "float32"), ("b", TENSORS["b"], "float32")], "ab", 8),  # all of them
        ([("a", TENSORS["a"], "float32"), ("b", TENSORS["b"], "float32")], "a", 7),
        ([("a", TENSORS["a"], "float32"), ("b", TENSORS["b"], "float32")], "", 2),
        ([("a", TENSORS["a"], "bfloat16")], "ab", 2),
    ],
    ids=["in place", "some in place", "computed", "of another type"],
)
def test_many_batches_are_under_way_where_they_need_no_scratch_and_two_where_they_do(
    pieces: list[tuple[str, torch.Tensor, str]], names_in_place: str, most: int
) -> None:
    wire = Wire("e", [frozenset()])
    sender = sender_of([wire], [Rows(names_in_place=names_in_place)], plans=(plan(*pieces),), batch_bytes=16)
    digests = send(sender).digests
    assert (wire.most_under_way, wire.num_under_way) == (most, 0)
    assert unsigned(digests) == [digest(view.to(dtype_from_name(dtype))) for _, view, dtype in pieces]
    wire.most_under_way = 0
    assert torch.equal(send(sender).digests, digests) and wire.most_under_way == most
    send(sender, verify="full")  # what goes back takes turns with what goes there
    assert wire.num_under_way == 0


def test_workers_get_their_own_slices_and_nobody_gets_what_nobody_wants() -> None:
    wire = Wire("e", [frozenset()] * 2)
    upper, lower = plan(("a", TENSORS["a"][:3], "float32")), plan(("a", TENSORS["a"][3:], "float32"))
    source = Rows()
    assert send(sender_of([wire], [source], plans=(upper, lower), batch_bytes=1 << 20)).num_bytes == 96
    assert [parcel.peer for parcel in wire.sent] == [10, 11]
    assert torch.equal(wire.sent[1].tensor, TENSORS["a"][3:])
    assert source.yielded == list(TENSORS)  # to the end: the last ones may be collectives


@pytest.mark.parametrize("lasts", [0, 2])
def test_an_engine_that_cannot_be_sent_to_is_closed_and_the_other_gets_everything(lasts: int) -> None:
    wires = [Wire("bad", [frozenset()], lasts=lasts), Wire("good", [frozenset()])]
    report = send(sender_of(wires, [Rows()]), 2)
    assert dict(report.lost) == {"bad": Loss("ConnectionError: cut")}
    assert wires[0].is_closed and not wires[1].is_closed and len(wires[0].sent) < len(wires[1].sent)
    alone = Wire("alone", [frozenset()])
    assert torch.equal(send(sender_of([alone], [Rows()])).digests, report.digests)
    assert all(torch.equal(a, b) for a, b in zip(alone.values, wires[1].values, strict=True))


def test_what_comes_back_different_is_named_when_everything_is_compared() -> None:
    wire = Wire("e", [frozenset()])
    report = send(sender_of([wire], [Rows()]), verify="full")
    assert set(report.mismatches["e"]) == {"a", "b", "c"}
    assert send(sender_of([Wire("e", [frozenset()])], [Rows()])).mismatches == {}
