"""Whatever an engine sends, a completion or a documented error comes of it."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engines.answers import parse_completion, parse_json
from shoal.engines.vllm_metrics import parse_metrics
from shoal.errors import EngineFaultError, EngineRequestError
from shoal.types import EngineReport
from shoal.wire.agreement import Agreement
from shoal.wire.plan import SlicePlan

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=12,
)
ids = st.lists(st.integers(-5, 2**33) | json_values, max_size=4)


@settings(max_examples=150)
@given(ids | json_values, ids | json_values, st.sampled_from(["stop", "length", "abort"]) | json_values, st.booleans())
def test_no_json_makes_a_completion_raise_anything_else(
    token_ids: Any, logprobs: Any, finish_reason: Any, was_cut: bool
) -> None:
    choice = {"token_ids": token_ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": finish_reason}
    with suppress(EngineRequestError):
        rollout = parse_completion("e", {"choices": [choice]}, version=3, was_cut=was_cut)
        assert rollout.token_ids.tolist() == token_ids  # it is what was sent, not what numpy makes of it
        assert np.isfinite(rollout.rollout_logprobs).all()
        assert rollout.finish_reason in ("stop", "length", "cut")


@given(json_values)
def test_no_other_json_is_a_completion(answer: Any) -> None:
    with pytest.raises(EngineFaultError):
        parse_completion("e", answer, version=3, was_cut=False)


@given(st.binary(max_size=60))
def test_no_bytes_make_json_raise_anything_else(body: bytes) -> None:
    with suppress(EngineFaultError):
        parse_json("e", "/x", body)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"1" * 10_000])
def test_json_that_breaks_parsers_is_the_engines_fault(body: bytes) -> None:
    with pytest.raises(EngineFaultError, match="e answered /x with something that is not JSON"):
        parse_json("e", "/x", body)


names = st.sampled_from(["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total"])
values = st.sampled_from(["1", "nan", "inf", "-inf", "1e999", "-3", "x", "1_0", "0x1", "٣"]) | st.text(max_size=5)


@settings(max_examples=150)
@given(st.lists(st.tuples(names, st.text(max_size=5), values), max_size=6), st.text(max_size=30))
def test_no_page_makes_metrics_raise(lines: list[tuple[str, str, str]], noise: str) -> None:
    page = "\n".join(f"vllm:{name}{{{labels}}} {value}" for name, labels, value in lines) + "\n" + noise
    report = parse_metrics(page)
    assert report is None or isinstance(report, EngineReport)


@settings(max_examples=150)
@given(json_values | st.text(max_size=30))
@pytest.mark.parametrize("kind", [SlicePlan, Agreement])
def test_no_text_makes_what_engines_say_of_weights_raise_anything_else(kind: Any, value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    with suppress(ValueError):
        kind.from_json(text)


@settings(max_examples=150)
@given(st.data())
@pytest.mark.parametrize("kind", [SlicePlan, Agreement])
def test_no_value_in_them_makes_them_raise_anything_else(kind: Any, data: st.DataObject) -> None:
    fields = list(kind.__dataclass_fields__)
    entries = {name: data.draw(json_values, name) for name in fields}
    with suppress(ValueError):
        kind.from_json(json.dumps(entries))
