"""What a core keeps back arrives all the same: whole, in order, and with its own logprobs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.vllm_plugin.held_outputs import HeldOutputs, StepLogprobs


class Lists:
    """A step's logprobs in the layout of vLLM's."""

    def __init__(self, logprobs: list[float]) -> None:
        self.logprobs = np.array(logprobs, dtype=np.float32)[:, None]
        self.sampled_token_ranks = np.arange(len(logprobs), dtype=np.int32)

    def slice_request(self, req_idx: int, num_positions: int) -> Any:
        return Lists(self.logprobs[req_idx : req_idx + num_positions, 0].tolist())


def join(token_ids: list[int], logprobs: list[float], ranks: list[int]) -> Any:
    assert len(token_ids) == len(logprobs) == len(ranks)
    return Lists(logprobs)


def output(name: str, token: int, row: Any, *, finish: str | None = None, events: Any = None) -> Any:
    return SimpleNamespace(
        request_id=name,
        new_token_ids=[token],
        new_logprobs=row,
        finish_reason=finish,
        events=events,
        prefill_stats=None,
    )


def told(outputs: list[Any]) -> list[tuple[str, list[int], list[float]]]:
    return [(o.request_id, o.new_token_ids, o.new_logprobs.logprobs[:, 0].tolist()) for o in outputs]


def test_tokens_are_kept_and_come_out_together() -> None:
    held = HeldOutputs(join)
    held.open("a")
    for place in range(3):
        step = StepLogprobs(Lists([0.0, -place]))
        assert held.sift([output("a", 10 + place, step.slice_request(1, 1))], step) == []
    assert told([each for _, each in held.release()]) == [("a", [10, 11, 12], [0.0, -1.0, -2.0])]
    assert list(held.release()) == []


def test_a_request_that_did_not_allow_it_passes_with_its_own_row() -> None:
    held = HeldOutputs(join)
    step = StepLogprobs(Lists([-1.0, -2.0]))
    passed = held.sift([output("b", 5, step.slice_request(1, 1))], step)
    assert told(passed) == [("b", [5], [-2.0])]
    assert list(held.release()) == []


def test_the_last_token_brings_those_before_it_and_nothing_is_left() -> None:
    held = HeldOutputs(join)
    held.open("a")
    step = StepLogprobs(Lists([-1.0]))
    held.sift([output("a", 1, 0)], step)
    (last,) = held.sift([output("a", 2, 0, finish="stop")], step)
    assert last.finish_reason == "stop"
    assert told([last]) == [("a", [1, 2], [-1.0, -1.0])]
    assert list(held.release()) == []


def test_what_tells_of_more_than_a_token_goes_on_at_once() -> None:
    held = HeldOutputs(join)
    held.open("a")
    step = StepLogprobs(Lists([-1.0]))
    held.sift([output("a", 1, 0)], step)
    (passed,) = held.sift([output("a", 2, 0, events=["preempted"])], step)
    assert passed.events == ["preempted"]
    assert passed.new_token_ids == [1, 2]


def test_several_positions_at_once_are_kept_whole() -> None:
    held = HeldOutputs(join)
    held.open("a")
    step = StepLogprobs(Lists([-1.0, -2.0, -3.0]))
    several = output("a", 7, step.slice_request(1, 2))
    several.new_token_ids = [7, 8]
    held.sift([several], step)
    assert told([each for _, each in held.release()]) == [("a", [7, 8], [-2.0, -3.0])]


def test_nothing_is_kept_of_a_request_that_was_ended_from_outside() -> None:
    held = HeldOutputs(join)
    for name in ("a", "b"):
        held.open(name)
    step = StepLogprobs(Lists([-1.0, -2.0]))
    held.sift([output("a", 1, 0), output("b", 2, 1)], step)
    held.forget(["b"])
    assert told([each for _, each in held.release()]) == [("b", [2], [-2.0])]


def test_without_logprobs_there_are_none() -> None:
    held = HeldOutputs(join)
    held.open("a")
    held.sift([output("a", 1, None)], None)
    (last,) = held.sift([output("a", 2, None, finish="length")], None)
    assert (last.new_token_ids, last.new_logprobs) == ([1, 2], None)


@given(st.data())
def test_every_token_arrives_once_and_in_order_however_steps_and_releases_mix(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    held = HeldOutputs(join)
    received: dict[str, list[int]] = {}
    sent: dict[str, list[int]] = {f"r{index}": [] for index in range(len(lengths))}
    for name in data.draw(st.sets(st.sampled_from(sorted(sent)))):
        held.open(name)
    left = dict(zip(sent, lengths, strict=True))
    while left:
        names = data.draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
        step = StepLogprobs(Lists([-float(row) for row in range(len(names))]))
        outputs = []
        for row, name in enumerate(names):
            left[name] -= 1
            token = len(sent[name]) * 100 + row
            sent[name].append(token)
            finish = None if left[name] else "length"
            outputs.append(output(name, token, row, finish=finish))
            if finish:
                del left[name]
        passed = held.sift(outputs, step)
        if data.draw(st.booleans()):
            passed = passed + [each for _, each in held.release()]
        for each in passed:
            assert each.new_logprobs.logprobs[:, 0].tolist() == [-float(token % 100) for token in each.new_token_ids]
            received.setdefault(each.request_id, []).extend(each.new_token_ids)
    assert received == sent
