"""Who sends what: every element once, from a rank that has it, into its place, and alike on all sides."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.types import Interval, ParameterMeta
from shoal.wire.plan import Region, Slice, SlicePlan, dtype_from_name
from shoal.wire.schedule import Holdings, Message, Ownership, Part, ScheduleError, assign, batches, messages, run_within


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Parameters, what ranks hold of them, and a worker's plan for them.

    Attributes:
        parameters: Of the checkpoint.
        holdings: Of each rank.
        plan: Its targets are fresh parameters, each written by one slice or by several side by side.
        sizes: Elements of each target.
        max_bytes: Of a batch.
    """

    parameters: tuple[ParameterMeta, ...]
    holdings: tuple[Holdings, ...]
    plan: SlicePlan
    sizes: dict[str, int]
    max_bytes: int


@st.composite
def settings_of_a_publish(draw: st.DrawFn) -> Setting:
    shapes = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
    parameters = tuple(
        ParameterMeta(name=f"p{i}", dtype=draw(st.sampled_from(["float32", "bfloat16"])), shape=draw(shapes))
        for i in range(draw(st.integers(1, 4)))
    )
    slices: list[Slice] = []
    sizes: dict[str, int] = {}
    for meta in parameters:
        for number in range(draw(st.integers(0, 3))):
            view = torch.empty(meta.shape, device="meta")
            for _ in range(draw(st.integers(0, 2))):  # a slice of a slice: rows, columns, every second one, one alone
                axis = draw(st.integers(0, view.ndim - 1))
                start = draw(st.integers(0, view.shape[axis] - 1))
                stop = draw(st.integers(start + 1, view.shape[axis]))
                step = draw(st.integers(1, 2)) if axis == 0 else 1
                view = view[(slice(None),) * axis + (slice(start, stop, step),)]
            target = f"{meta.name}/{number}"
            # In the engine it lies beside something else, as q lies beside k and v, or in columns.
            pad = draw(st.integers(0, 3))
            place = torch.empty((*view.shape[:-1], view.shape[-1] + pad), device="meta")[..., pad:]
            sizes[target] = place.untyped_storage().nbytes() // place.element_size()
            slices.append(
                Slice(
                    source=meta.name,
                    source_region=Region.of(view),
                    target=target,
                    target_region=Region.of(place),
                    dtype="float32",
                )
            )
    return Setting(
        parameters=parameters,
        holdings=draw(holdings_of(parameters)),
        plan=SlicePlan(worker="w", slices=tuple(slices), fills=(), reloaded=()),
        sizes=sizes,
        max_bytes=draw(st.integers(4, 200)),
    )


@st.composite
def holdings_of(draw: st.DrawFn, parameters: Sequence[ParameterMeta]) -> tuple[Holdings, ...]:
    """Whole on each rank, rows, or ragged runs; each in some replicas."""
    num_shards = draw(st.integers(1, 3))
    shards: list[dict[str, Interval]] = [{} for _ in range(num_shards)]
    for meta in parameters:
        kind = draw(st.sampled_from(["rows", "ragged", "one"]))
        size = meta.num_elements
        if kind == "rows":
            row = size // meta.shape[0]
            chunk = -(-meta.shape[0] // num_shards)  # as torch.chunk does: the last ranks may have nothing
            cuts = [min(i * chunk, meta.shape[0]) * row for i in range(num_shards + 1)]
        elif kind == "ragged":
            cuts = [0, *sorted(draw(st.integers(0, size)) for _ in range(num_shards - 1)), size]
        else:
            owner = draw(st.integers(0, num_shards - 1))
            cuts = [0 if i <= owner else size for i in range(num_shards + 1)]
        for shard, (start, stop) in zip(shards, itertools.pairwise(cuts), strict=True):
            if start < stop:
                shard[meta.name] = Interval(start, stop)
    return tuple(shards) * draw(st.integers(1, 2))


def all_messages(case: Setting, ownership: Ownership) -> list[Message]:
    return [
        message
        for parts in batches(case.parameters, case.max_bytes)
        for part in parts
        for message in messages(case.plan, ownership, part)
    ]


def positions(region: Region) -> list[int]:
    """Return which elements of the tensor a region is about, in its row-major order."""
    return [
        region.offset + sum(i * stride for i, stride in zip(index, region.strides, strict=True))
        for index in itertools.product(*map(range, region.shape))
    ]


def carry_out(case: Setting, sent: Sequence[Message]) -> dict[str, torch.Tensor]:
    """Take each message out of the sending rank's own run of the parameter and put it in its place."""
    whole = {
        meta.name: torch.arange(meta.num_elements, dtype=torch.float32) + 1000.0 * number
        for number, meta in enumerate(case.parameters, start=1)
    }
    held = [{n: whole[n][i.start : i.stop].clone() for n, i in holding.items()} for holding in case.holdings]
    into = {name: torch.full((size,), -1.0) for name, size in case.sizes.items()}
    for message in sent:
        piece = case.plan.slices[message.slice_index]
        first = case.holdings[message.rank][piece.source].start
        value = message.source.view(held[message.rank][piece.source], first=first).contiguous()
        message.target.view(into[piece.target]).copy_(value)
    return into


def as_planned(case: Setting) -> dict[str, torch.Tensor]:
    into = {name: torch.full((size,), -1.0) for name, size in case.sizes.items()}
    for piece in case.plan.slices:
        number = [meta.name for meta in case.parameters].index(piece.source)
        whole = torch.arange(case.parameters[number].num_elements, dtype=torch.float32) + 1000.0 * (number + 1)
        piece.target_region.view(into[piece.target]).copy_(piece.source_region.view(whole))
    return into


@settings(deadline=None, max_examples=150)
@given(settings_of_a_publish(), st.frozensets(st.integers(0, 5)))
def test_messages_cover_each_slice_once_from_ranks_that_hold_it_and_leave_what_the_plan_says(
    case: Setting, preferred: frozenset[int]
) -> None:
    sent = all_messages(case, assign(case.parameters, case.holdings, preferred))
    seen: dict[int, list[int]] = {index: [] for index in range(len(case.plan.slices))}
    for message in sent:
        held = case.holdings[message.rank][case.plan.slices[message.slice_index].source]
        assert all(held.start <= position < held.stop for position in positions(message.source))
        assert message.source.shape == message.target.shape
        assert positions(case.plan.slices[message.slice_index].source_region)[
            message.start : message.start + message.source.num_elements
        ] == positions(message.source)
        seen[message.slice_index] += range(message.start, message.start + message.source.num_elements)
    for index, piece in enumerate(case.plan.slices):
        assert sorted(seen[index]) == list(range(piece.source_region.num_elements))
    wanted = as_planned(case)
    for name, value in carry_out(case, sent).items():
        assert torch.equal(value, wanted[name]), name


@settings(deadline=None, max_examples=50)
@given(settings_of_a_publish(), st.data())
def test_a_message_that_is_lost_or_lands_elsewhere_is_seen(case: Setting, data: st.DataObject) -> None:
    sent = all_messages(case, assign(case.parameters, case.holdings))
    if not sent:
        return
    index = data.draw(st.integers(0, len(sent) - 1))
    wanted, less = as_planned(case), carry_out(case, [*sent[:index], *sent[index + 1 :]])
    assert any(not torch.equal(less[name], value) for name, value in wanted.items())  # the control of the test above
    if sent[index].source.offset > case.holdings[sent[index].rank][f"p{_source(case, sent[index])}"].start:
        moved = replace(sent[index].source, offset=sent[index].source.offset - 1)
        other = carry_out(case, [*sent[:index], replace(sent[index], source=moved), *sent[index + 1 :]])
        assert any(not torch.equal(other[name], value) for name, value in wanted.items())


def _source(case: Setting, message: Message) -> int:
    return int(case.plan.slices[message.slice_index].source[1:])


@settings(deadline=None, max_examples=50)
@given(settings_of_a_publish())
def test_all_sides_derive_the_same(case: Setting) -> None:
    ownership = assign(case.parameters, case.holdings)
    # What the other side has is what JSON leaves of it.
    plan = SlicePlan.from_json(case.plan.to_json())
    other = replace(case, plan=plan, holdings=tuple(dict(reversed(holding.items())) for holding in case.holdings))
    assert all_messages(case, ownership) == all_messages(other, assign(other.parameters, other.holdings))


def test_who_takes_another_bound_or_other_holdings_gets_out_of_step() -> None:
    meta = ParameterMeta(name="p0", dtype="float32", shape=(10,))
    region = Region.of(torch.empty(10, device="meta"))
    piece = Slice(source="p0", source_region=region, target="t", target_region=region, dtype="float32")
    holdings = ({"p0": Interval(0, 5)}, {"p0": Interval(5, 10)})
    case = Setting(
        parameters=(meta,),
        holdings=holdings,
        plan=SlicePlan(worker="w", slices=(piece,), fills=(), reloaded=()),
        sizes={"t": 10},
        max_bytes=12,
    )
    sent = all_messages(case, assign([meta], holdings))  # the control of the test above
    assert sent != all_messages(replace(case, max_bytes=8), assign([meta], holdings))
    assert sent != all_messages(case, assign([meta], ({"p0": Interval(0, 6)}, holdings[1])))


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from(["float32", "bfloat16"]), st.integers(0, 300)), max_size=12),
    st.integers(1, 400),
)
def test_batches_keep_to_their_bound_and_hold_every_element_in_order(
    sizes: list[tuple[str, int]], max_bytes: int
) -> None:
    parameters = [ParameterMeta(name=f"p{i}", dtype=dtype, shape=(size,)) for i, (dtype, size) in enumerate(sizes)]
    width = {meta.name: dtype_from_name(meta.dtype).itemsize for meta in parameters}
    cut = batches(parameters, max_bytes)
    assert all(cut)
    for parts in cut:
        assert sum(part.interval.size * width[part.name] for part in parts) <= max(max_bytes, width[parts[0].name])
        assert len({part.name for part in parts}) == len(parts)
    flat = [(part.name, i) for parts in cut for part in parts for i in range(part.interval.start, part.interval.stop)]
    assert flat == [(meta.name, i) for meta in parameters for i in range(meta.num_elements)]


def test_a_parameter_that_fits_a_batch_is_not_cut() -> None:
    parameters = [ParameterMeta(name=name, dtype="float32", shape=(30,)) for name in "abc"]
    assert [[part.name for part in parts] for parts in batches(parameters, 200)] == [["a"], ["b"], ["c"]]
    assert [[part.name for part in parts] for parts in batches(parameters, 240)] == [["a", "b"], ["c"]]
    assert len(batches(parameters, 100)) > 3  # the control: one that does not fit is


META = [ParameterMeta(name=f"p{i}", dtype="bfloat16", shape=(100 + i, 8)) for i in range(10)]
WHOLE = {meta.name: Interval(0, meta.num_elements) for meta in META}


def sent_by(ownership: Ownership) -> dict[int, int]:
    counts: dict[int, int] = {}
    for segments in ownership.values():
        for segment in segments:
            counts[segment.rank] = counts.get(segment.rank, 0) + segment.interval.size
    return counts


def test_replicas_share_the_work_about_evenly() -> None:
    total = sum(meta.num_elements for meta in META)
    counts = sent_by(assign(META, [WHOLE, WHOLE]))
    assert sum(counts.values()) == total
    assert abs(counts[0] - counts[1]) < 0.15 * total
    assert sent_by(assign(META, [WHOLE, {}])) == {0: total}  # the control: who has nothing sends nothing


def test_preferred_ranks_send_whatever_they_hold_and_the_others_the_rest() -> None:
    total = sum(meta.num_elements for meta in META)
    assert sent_by(assign(META, [WHOLE, WHOLE, WHOLE], frozenset({1}))) == {1: total}
    half = {meta.name: Interval(meta.num_elements // 2, meta.num_elements) for meta in META}
    num_half = sum(interval.size for interval in half.values())
    assert sent_by(assign(META, [WHOLE, half], frozenset({1}))) == {0: total - num_half, 1: num_half}
    middle = {meta.name: Interval(8, 16) for meta in META}
    assert sent_by(assign(META, [WHOLE, middle], frozenset({1})))[1] == 80


@pytest.mark.parametrize("missing", ["p3", "p9"])
def test_elements_that_nobody_holds_are_named(missing: str) -> None:
    less = {name: interval for name, interval in WHOLE.items() if name != missing}
    with pytest.raises(ScheduleError, match=rf"no trainer rank holds element 0 of {missing} \(10"):
        assign(META, [less, less])
    gap = less | {missing: Interval(0, 40)}
    with pytest.raises(ScheduleError, match=f"element 40 of {missing}"):
        assign(META, [gap, less | {missing: Interval(41, WHOLE[missing].stop)}])
    assign(META, [gap, less | {missing: Interval(40, WHOLE[missing].stop)}])  # the control


def test_a_region_that_the_loader_reorders_travels_whole_or_not_at_all() -> None:
    turned = Region.of(torch.empty(4, 6, device="meta")[:, 1:3].t())
    assert run_within(turned, Interval(0, 24), "p") == Interval(0, 8)
    assert run_within(turned, Interval(1, 21), "p") == Interval(0, 8)
    assert run_within(turned, Interval(21, 24), "p").size == run_within(turned, Interval(0, 1), "p").size == 0
    for cut in (Interval(0, 12), Interval(2, 24), Interval(0, 20)):
        with pytest.raises(ScheduleError, match="reorders p, which is cut into elements"):
            run_within(turned, cut, "p")
    straight = Region.of(torch.empty(4, 6, device="meta")[:, 1:3])
    assert run_within(straight, Interval(0, 12), "p") == Interval(0, 4)  # the control: in order, it may be cut


@pytest.mark.parametrize(("num_ranks", "max_bytes", "works"), [(1, 96, True), (1, 60, False), (2, 96, False)])
def test_a_reordered_parameter_needs_one_rank_and_one_batch(num_ranks: int, max_bytes: int, works: bool) -> None:
    meta = ParameterMeta(name="p", dtype="float32", shape=(4, 6))
    turned = torch.empty(4, 6, device="meta").t()
    plan = SlicePlan(
        worker="w",
        slices=(
            Slice(
                source="p",
                source_region=Region.of(turned),
                target="t",
                target_region=Region.of(torch.empty(6, 4, device="meta")),
                dtype="float32",
            ),
        ),
        fills=(),
        reloaded=(),
    )
    holdings = [{"p": Interval(24 // num_ranks * r, 24 // num_ranks * (r + 1))} for r in range(num_ranks)]
    case = Setting(parameters=(meta,), holdings=tuple(holdings), plan=plan, sizes={"t": 24}, max_bytes=max_bytes)
    ownership = assign(case.parameters, case.holdings)
    if works:
        sent = all_messages(case, ownership)
        assert torch.equal(carry_out(case, sent)["t"], as_planned(case)["t"]) and len(sent) == 1
    else:
        with pytest.raises(ScheduleError, match="only be sent whole"):
            all_messages(case, ownership)


def test_a_part_of_a_parameter_that_the_worker_has_no_use_for_brings_nothing() -> None:
    plan = SlicePlan(worker="w", slices=(), fills=(), reloaded=())
    assert not list(messages(plan, assign(META, [WHOLE]), Part("p1", Interval(0, 5))))
