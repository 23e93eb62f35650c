"""The frames that completions travel in, and the orders that ask for them."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.types import RolloutRequest, SamplingSettings
from shoal.vllm_plugin.frames import Frame, FrameError, FrameReader, Kind, message_frame, tokens_frame
from shoal.vllm_plugin.orders import OrderError, order_body, parse_order

ENDS = (Kind.STOP, Kind.LENGTH, Kind.ABORT)


def bits(values: Any) -> list[int]:
    return np.asarray(values, dtype=np.float32).view(np.int32).tolist()


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[begin:end] for begin, end in pairwise(edges)]


tokens = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(-1e9, 0, width=32)), max_size=9)


@given(st.lists(st.tuples(tokens, tokens, st.sampled_from(ENDS)), min_size=1, max_size=4), st.lists(st.integers(0)))
def test_frames_arrive_as_they_were_sent_however_the_bytes_are_cut(samples: list[Any], places: list[int]) -> None:
    sent = [(i, Kind.MORE, first) for i, (first, _, _) in enumerate(samples)]
    sent += [(i, kind, rest) for i, (_, rest, kind) in enumerate(samples)]
    data = b"".join(tokens_frame(i, kind, [t for t, _ in part], [p for _, p in part]) for i, kind, part in sent)
    reader = FrameReader([len(first) + len(rest) + 1 for first, rest, _ in samples])
    frames = [frame for piece in cut(data, places) for frame in reader.feed(piece)]
    assert [(f.sample, f.kind, f.token_ids.tolist()) for f in frames] == [
        (i, kind, [token for token, _ in part]) for i, kind, part in sent
    ]
    assert [bits(f.logprobs) for f in frames] == [bits([p for _, p in part]) for _, _, part in sent]
    assert all(f.token_ids.dtype == np.int32 and f.logprobs.dtype == np.float32 for f in frames)


@given(st.text(), st.sampled_from((Kind.REFUSED, Kind.FAILED)))
def test_a_message_arrives(text: str, kind: Kind) -> None:
    (frame,) = FrameReader([5]).feed(message_frame(0, kind, text))
    assert frame.kind is kind and frame.token_ids.size == frame.logprobs.size == 0
    assert text.encode(errors="replace").decode().startswith(frame.message[:1000])


@pytest.mark.parametrize(
    "data",
    [
        b"<html>a proxy</html>",
        b"HTTP/1.1 200 OK\r\n\r\n",
        tokens_frame(2, Kind.STOP, [1], [0.0]),  # nobody asked for it
        tokens_frame(0, Kind.STOP, [1], [0.0]) * 2,  # it has ended
        tokens_frame(0, Kind.LENGTH, [1] * 4, [0.0] * 4),  # more than asked for
        tokens_frame(0, Kind.MORE, [1, 2], [0.0] * 2) + tokens_frame(0, Kind.LENGTH, [1, 2], [0.0] * 2),
        tokens_frame(0, Kind.MORE, [1] * 3, [0.0] * 3),  # all there may be, and no end
        tokens_frame(0, Kind.STOP, [-1], [0.0]),
        tokens_frame(0, Kind.STOP, [1], [0.0]).replace(b"SHF1", b"SHF2"),
        b"SHF1" + (0).to_bytes(4, "little") + (9).to_bytes(4, "little") + bytes(4),  # no such kind
        b"SHF1" + (0).to_bytes(4, "little") + (5).to_bytes(4, "little") + (2**32 - 1).to_bytes(4, "little"),
    ],
)
def test_what_was_not_asked_for_is_refused_before_it_is_read(data: bytes) -> None:
    with pytest.raises(FrameError):
        FrameReader([3, 3]).feed(data)


mutations = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=6)


@settings(max_examples=150)
@given(st.binary(max_size=200), mutations, st.lists(st.integers(0, 200), max_size=5))
def test_no_bytes_make_the_reader_raise_anything_else_or_return_what_was_not_asked_for(
    noise: bytes, changes: list[tuple[int, int]], places: list[int]
) -> None:
    good = tokens_frame(0, Kind.MORE, [5, 6], [-1.0, -2.0]) + tokens_frame(1, Kind.STOP, [7], [-0.5])
    changed = bytearray(good + message_frame(0, Kind.FAILED, "x") if changes else noise)
    for place, value in changes:
        if place < len(changed):
            changed[place] = value
    reader = FrameReader([4, 4])
    frames: list[Frame] = []
    with suppress(FrameError):
        for piece in cut(bytes(changed) + noise, places):
            frames += reader.feed(piece)
    for sample in (0, 1):
        mine = [frame for frame in frames if frame.sample == sample]
        assert sum(len(frame.token_ids) for frame in mine) <= 4
        assert all(frame.kind is Kind.MORE for frame in mine[:-1])
    assert len(reader._buffer) <= 16 + 4096 + 400  # it never waits for more than a frame may have


SAMPLING = SamplingSettings(temperature=0.5, max_tokens=9, stop_token_ids=(2, 3), top_k=7, top_p=0.9, min_p=0.1)


def request(prompt: tuple[int, ...], name: str, seed: int = 3) -> RolloutRequest:
    return RolloutRequest(prompt_token_ids=prompt, seed=seed, sampling=SAMPLING, name=name)


def test_an_order_says_what_the_requests_say_and_each_prompt_once() -> None:
    body = order_body(
        [request((5, 6), "a"), request((7,), "b", 4), request((5, 6), "c", 5)], model="m", salt="s", flush_tokens=8
    )
    assert json.loads(body)["prompts"] == [[5, 6], [7]]
    order = parse_order(body)
    assert (order.model, order.salt, order.flush_tokens) == ("m", "s", 8)
    assert [(s.prompt_token_ids, s.name, s.seed) for s in order.samples] == [
        ([5, 6], "a", 3), ([7], "b", 4), ([5, 6], "c", 5)
    ]  # fmt: skip
    assert order.samples[0].sampling == {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "max_tokens": 9, "stop_token_ids": [2, 3],
        "ignore_eos": False,
    }  # fmt: skip


def test_a_completion_that_nothing_ends_goes_on_past_the_tokenizers_own_end() -> None:
    wanted = replace(request((5,), "a"), sampling=replace(SAMPLING, stop_token_ids=()))
    (sample,) = parse_order(order_body([wanted], model="m", salt="", flush_tokens=0)).samples
    assert sample.sampling["ignore_eos"] is True


def order(**changes: Any) -> dict[str, Any]:
    return json.loads(order_body([request((5, 6), "a")], model="m", salt="", flush_tokens=8)) | changes


def sample(**changes: Any) -> dict[str, Any]:
    return order(samples=[order()["samples"][0] | changes])


BAD = [
    b"", b"\xff", b"[" * 100_000, b"7", b"[]", b"{}", order(extra=1), order(model=7), order(salt=None),
    order(flush_tokens=-1), order(flush_tokens=True), order(prompts=[]), order(prompts=[[]]), order(prompts=[[5.0]]),
    order(prompts=[[True]]), order(prompts=[[-1]]), order(prompts=[[2**31]]), order(prompts=[["5"]]), order(samples=[]),
    order(samples=[7]), order(samples=order()["samples"] * 2), order(samples=order()["samples"] * 2000),
    sample(prompt=1), sample(prompt=-1), sample(name=""), sample(name="x" * 300), sample(seed=2**63), sample(seed=1.5),
    sample(temperature=-1), sample(temperature=float("nan")), sample(temperature=float("inf")), sample(max_tokens=0),
    sample(max_tokens=2**40), sample(stop_token_ids=["a"]), sample(stop_token_ids=None), sample(top_q=1),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad)[:60])
def test_a_body_that_is_no_order_is_refused(bad: Any) -> None:
    with pytest.raises(OrderError):
        parse_order(bad if isinstance(bad, bytes) else json.dumps(bad).encode())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(st.sampled_from([*order(), *order()["samples"][0]]), json_values)
def test_no_value_anywhere_makes_an_order_raise_anything_else(name: str, value: Any) -> None:
    with suppress(OrderError):
        parse_order(json.dumps(order(**{name: value}) if name in order() else sample(**{name: value})).encode())


@given(st.binary(max_size=100))
def test_no_bytes_make_an_order_raise_anything_else(body: bytes) -> None:
    with pytest.raises(OrderError):
        parse_order(body)
