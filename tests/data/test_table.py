"""The sequence table: an exact round trip, and room for a table from its sizes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data.table import empty_table, sequences_from_table, table_from_sequences
from shoal.types import Sequence


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    """Any sequence, engine logprobs of NaN included."""
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8))
    prompt_length = draw(st.integers(1, len(ids)))
    size = len(ids) - prompt_length
    logprobs = draw(st.lists(st.floats(width=32), min_size=size, max_size=size))
    return Sequence(
        token_ids=np.array(ids, dtype=np.int64),
        prompt_length=prompt_length,
        advantage=draw(st.floats(allow_nan=False)),
        rollout_logprobs=np.array(logprobs, dtype=np.float32),
        in_loss=draw(st.booleans()),
        by_policy=_marks(draw(st.lists(st.booleans(), min_size=size, max_size=size))),
    )


def _marks(by_policy: list[bool]) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]] | None:
    """Who wrote which token; None, as engines give it, where the policy wrote all."""
    return None if all(by_policy) else np.array(by_policy, dtype=np.bool_)


def assert_same(mine: list[Sequence], theirs: list[Sequence]) -> None:
    """Compare values and types, exactly."""
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert (a.prompt_length, a.advantage, a.in_loss) == (b.prompt_length, b.advantage, b.in_loss)
        assert [str(a.token_ids.dtype), str(a.rollout_logprobs.dtype)] == ["int64", "float32"]
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.rollout_logprobs, b.rollout_logprobs)
        assert (a.by_policy is None) == (b.by_policy is None)
        np.testing.assert_array_equal(a.is_target, b.is_target)


@settings(deadline=None, max_examples=80)
@given(st.lists(sequences(), max_size=6))
def test_sequences_survive_the_table_exactly(step: list[Sequence]) -> None:
    assert_same(sequences_from_table(table_from_sequences(step)), step)


@settings(deadline=None, max_examples=40)
@given(st.lists(sequences(), max_size=6))
def test_a_rank_that_knows_the_sizes_can_receive_the_table(step: list[Sequence]) -> None:
    sent = table_from_sequences(step)
    received = empty_table(sent.sizes)
    for mine, theirs in zip(received.tensors, sent.tensors, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        mine.copy_(theirs)
    assert_same(sequences_from_table(received), step)


def test_the_table_has_the_types_that_it_says() -> None:
    step = [
        Sequence(
            token_ids=np.array([7, 8]),
            prompt_length=1,
            advantage=1 / 3,
            rollout_logprobs=np.array([-0.5], dtype=np.float32),
            in_loss=True,
        )
    ]
    table = table_from_sequences(step)
    types = [tensor.dtype for tensor in table.tensors]
    assert types == [torch.int32, torch.int32, torch.int32, torch.float64, torch.float32, torch.bool, torch.bool]
    assert table.advantages.item() == 1 / 3
