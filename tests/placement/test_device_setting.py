"""The device setting is read as written, and what cannot be read is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import PlacementError
from shoal.placement.parse import DeviceSpec, format_gpus, parse_devices


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("auto", DeviceSpec(kind="auto")),
        (" colocate ", DeviceSpec(kind="colocate")),
        ("cpu", DeviceSpec(kind="cpu")),
        ("cpu:2", DeviceSpec(kind="cpu", num_engines=2)),
        ("cuda:2,cuda:3", DeviceSpec(kind="cuda", indices=(2, 3))),
        ("4-7", DeviceSpec(kind="cuda", indices=(4, 5, 6, 7))),
        ("cuda:4-5, 1", DeviceSpec(kind="cuda", indices=(4, 5, 1))),
        ("3", DeviceSpec(kind="cuda", indices=(3,))),
    ],
)
def test_each_form_is_read_as_documented(written: str, meant: DeviceSpec) -> None:
    assert parse_devices(written) == meant


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("", "''"),
        ("cuda:2,gpu3", "'gpu3'"),
        ("cuda:2,,3", "''"),
        ("cuda", "'cuda'"),
        ("cuda:-1", "'cuda:-1'"),
        ("1,cpu", "cannot be mixed"),
        ("7-4", "Write 4-7"),
        ("1-3,cuda:2", "cuda:2 twice"),
        ("0-99999999", "'0-99999999'"),
        ("cpu:0", "counts engines"),
    ],
)
def test_a_setting_that_cannot_be_read_names_the_piece(written: str, named: str) -> None:
    with pytest.raises(PlacementError) as refusal:
        parse_devices(written, setting="vllm_devices")
    assert f'vllm_devices="{written}"' in str(refusal.value)
    assert named in str(refusal.value)


@given(st.lists(st.integers(0, 1023), min_size=1, max_size=20, unique=True))
def test_a_written_list_of_gpus_is_read_back_in_the_same_order(indices: list[int]) -> None:
    assert parse_devices(format_gpus(tuple(indices))).indices == tuple(indices)


@given(st.text(alphabet="cudap:,-0123456789 ", max_size=20))
def test_any_text_is_read_or_refused_as_a_placement_error(written: str) -> None:
    try:
        spec = parse_devices(written)
    except PlacementError as refusal:
        assert written in str(refusal)
    else:
        assert len(set(spec.indices)) == len(spec.indices)
