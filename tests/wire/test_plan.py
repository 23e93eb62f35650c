"""Slice plans: regions are views, plans survive the wire, garbage does not."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.types import ParameterMeta
from shoal.wire.plan import (
    Fill,
    Region,
    Slice,
    SlicePlan,
    dtype_from_name,
    dtype_name,
    metadata_from_json,
    metadata_to_json,
)

sizes = st.lists(st.integers(0, 10**12), max_size=4).map(tuple)
regions = st.builds(Region, offset=st.integers(0, 10**12), shape=sizes, strides=sizes)
names = st.text(max_size=30)
slices = st.builds(
    Slice, source=names, source_region=regions, target=names, target_region=regions, dtype=st.sampled_from(["bfloat16"])
)
fills = st.builds(Fill, target=names, target_region=regions, value=st.floats(allow_nan=False, allow_infinity=False))
plans = st.builds(
    SlicePlan,
    worker=names,
    slices=st.lists(slices, max_size=4).map(tuple),
    fills=st.lists(fills, max_size=3).map(tuple),
    reloaded=st.lists(names, max_size=3).map(tuple),
)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)

PLAN = SlicePlan(
    worker="engine-0 worker 1",
    slices=(
        Slice(
            source="a",
            source_region=Region(offset=4, shape=(2, 3), strides=(6, 1)),
            target="b",
            target_region=Region(offset=0, shape=(2, 3), strides=(3, 1)),
            dtype="bfloat16",
        ),
        Slice(
            source="a",
            source_region=Region(offset=0, shape=(1,), strides=(1,)),
            target="c",
            target_region=Region(offset=0, shape=(1,), strides=(1,)),
            dtype="float32",
        ),
    ),
    fills=(Fill(target="b", target_region=Region(offset=6, shape=(3,), strides=(1,)), value=-1.5),),
    reloaded=("b",),
)


@settings(deadline=None, max_examples=100)
@given(plans)
def test_a_plan_survives_the_wire_unchanged(plan: SlicePlan) -> None:
    assert SlicePlan.from_json(plan.to_json()) == plan


def test_a_plan_that_differs_in_one_offset_is_another_plan() -> None:
    data = asdict(PLAN)
    data["slices"][0]["source_region"]["offset"] += 1
    assert SlicePlan.from_json(json.dumps(data)) != PLAN  # the control of the test above


def test_slices_are_found_by_their_source_in_order() -> None:
    assert PLAN.by_source == {"a": (0, 1)}


@pytest.mark.parametrize("text", ["", "not JSON", "null", "[]", "3", '"worker"', "{}", '{"worker": "w"}'])
def test_what_is_no_plan_at_all_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        SlicePlan.from_json(text)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_plan_with_one_part_replaced_by_garbage_is_refused_as_a_value_error_or_parsed(data: st.DataObject) -> None:
    plan = json.loads(PLAN.to_json())
    place: Any = plan
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(json_values)
        break
    try:
        parsed = SlicePlan.from_json(json.dumps(plan))
    except ValueError:
        return  # no other exception may come out of it
    assert isinstance(parsed, SlicePlan)


@pytest.mark.parametrize("key", ["worker", "slices", "fills", "reloaded"])
def test_a_plan_that_lacks_a_part_is_refused_naming_it(key: str) -> None:
    data = asdict(PLAN)
    del data[key]
    with pytest.raises(ValueError, match=key):
        SlicePlan.from_json(json.dumps(data))


def test_a_region_describes_a_view_and_gives_it_back() -> None:
    table = torch.arange(60.0).view(5, 12)
    views = [
        table,
        table[1:3, 2:9:3],
        table.t(),
        table.view(-1)[7:11],
        table[4, 11],
        table[2:2],
        table[:1].expand(4, 12),
    ]
    for view in views:
        region = Region.of(view)
        assert region.num_elements == view.numel()
        assert torch.equal(region.view(table), view)


def test_a_region_writes_into_the_tensor_that_it_views() -> None:
    table = torch.zeros(4, 6)
    Region(offset=7, shape=(2, 2), strides=(6, 3)).view(table).copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    expected = torch.zeros(4, 6)
    expected[1, 1], expected[1, 4], expected[2, 1], expected[2, 4] = 1.0, 2.0, 3.0, 4.0
    assert torch.equal(table, expected)


def test_a_region_of_a_tensor_that_lies_inside_a_larger_buffer_is_counted_from_the_tensors_start() -> None:
    # As DeepSpeed lays parameters out: each is a view of one flat buffer.
    buffer = torch.arange(100.0)
    tensor = buffer[40:60].view(4, 5)
    assert torch.equal(Region(offset=5, shape=(2, 5), strides=(5, 1)).view(tensor), tensor[1:3])


def test_a_region_beyond_the_tensor_is_refused() -> None:
    with pytest.raises(RuntimeError):
        Region(offset=8, shape=(4,), strides=(1,)).view(torch.zeros(10))


def test_types_go_by_their_names_and_unknown_names_are_refused() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn):
        assert dtype_from_name(dtype_name(dtype)) is dtype
    assert dtype_name(torch.bfloat16) == "bfloat16"
    for name in ("bfloat17", "nn", "load", ""):
        with pytest.raises(ValueError, match="not a torch dtype"):
            dtype_from_name(name)


def test_metadata_survives_json_with_its_order() -> None:
    metas = (
        ParameterMeta(name="z", dtype="bfloat16", shape=(3, 4)),
        ParameterMeta(name="a", dtype="float32", shape=()),
    )
    assert metadata_from_json(json.loads(json.dumps(metadata_to_json(metas)))) == metas


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A view of a table of element numbers: rows, columns, steps, an element, turned or not."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    view = torch.arange(math.prod(shape)).view(shape)
    for _ in range(draw(st.integers(0, 3))):
        if view.ndim == 0:
            break
        axis = draw(st.integers(0, view.ndim - 1))
        if draw(st.integers(0, 5)) == 0:
            view = view.select(axis, draw(st.integers(0, view.shape[axis] - 1))) if view.shape[axis] else view
            continue
        start = draw(st.integers(0, view.shape[axis]))
        stop = draw(st.integers(start, view.shape[axis]))
        view = view[(slice(None),) * axis + (slice(start, stop, draw(st.integers(1, 3))),)]
    return view.t() if view.ndim == 2 and draw(st.booleans()) else view


@settings(deadline=None, max_examples=100)
@given(views(), st.data())
def test_a_region_comes_apart_into_boxes_that_are_runs_of_its_order(view: torch.Tensor, data: st.DataObject) -> None:
    region, table = Region.of(view), torch.arange(view.untyped_storage().nbytes() // view.element_size())
    start = data.draw(st.integers(0, region.num_elements))
    stop = data.draw(st.integers(start, region.num_elements))
    boxes = list(region.boxes(start, stop))
    assert [n for box in boxes for n in box.view(table).flatten().tolist()] == view.flatten().tolist()[start:stop]
    # The other side's region has the same shape and lies otherwise.
    beside = Region.of(torch.empty((*view.shape, 2), device="meta")[..., 0])
    assert [box.shape for box in beside.boxes(start, stop)] == [box.shape for box in boxes]
    # The control: one element more is another run.
    assert stop == region.num_elements or list(region.boxes(start, stop + 1)) != boxes


@settings(deadline=None, max_examples=100)
@given(views())
def test_order_is_told_and_elements_below_a_position_are_counted(view: torch.Tensor) -> None:
    region, numbers = Region.of(view), view.flatten().tolist()
    if numbers:
        assert region.is_ordered == all(a < b for a, b in itertools.pairwise(numbers))
    if region.is_ordered:
        for position in range(view.untyped_storage().nbytes() // view.element_size() + 1):
            assert region.num_below(position) == sum(number < position for number in numbers)


def test_what_is_turned_or_repeated_is_not_in_order() -> None:
    table = torch.empty(4, 6, device="meta")
    assert not Region.of(table.t()).is_ordered
    assert not Region.of(table[:1].expand(4, 6)).is_ordered
    assert Region.of(table[::2, 1:5:2]).is_ordered  # the control
    assert Region.of(table[:, :1].t()).is_ordered  # one column, turned: still one after the other
