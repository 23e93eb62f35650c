"""Micro-batches: each target predicted from the right place, each token weighted once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.algorithm.losses import LOSSES
from shoal.data.micro_batch import build_filler, build_micro_batch, pack
from shoal.types import MicroBatch, Sequence

quick = settings(deadline=None, max_examples=60)


def make_sequence(prompt: list[int], completion: list[int], advantage: float = 1.0, in_loss: bool = True) -> Sequence:
    """A sequence whose engine logprobs tell its tokens apart."""
    return Sequence(
        token_ids=np.array(prompt + completion, dtype=np.int64),
        prompt_length=len(prompt),
        advantage=advantage,
        rollout_logprobs=np.array([-token / 8 for token in completion], dtype=np.float32),
        in_loss=in_loss,
    )


token = st.integers(0, 1000)
sequences_of_step = st.lists(
    st.builds(
        make_sequence,
        st.lists(token, min_size=1, max_size=5),
        st.lists(token, max_size=6),
        st.floats(-3, 3, width=32),
        st.booleans(),
    ),
    min_size=1,
    max_size=10,
)


def weights_of(sequences: list[Sequence], loss_type: str = "dapo") -> list[float]:
    """The token weights of a step."""
    lengths = np.array([s.completion_length for s in sequences], dtype=np.int64)
    inside = np.array([s.in_loss for s in sequences], dtype=np.bool_)
    weights: list[float] = LOSSES[loss_type].token_weights(lengths, inside).tolist()
    return weights


def taken_apart(batch: MicroBatch) -> list[tuple[object, ...]]:
    """Each sequence of a micro-batch as (tokens, targets, engine logprobs, advantages, weights), from its tensors."""
    starts = [*torch.nonzero(batch.position_ids == 0).flatten().tolist(), batch.num_tokens]
    out: list[tuple[object, ...]] = []
    for i in range(batch.num_sequences):
        mine = batch.sequence_index == i
        assert (
            (starts[i] <= batch.predictor_positions[mine]) & (batch.predictor_positions[mine] < starts[i + 1])
        ).all()
        fields = (batch.target_ids, batch.rollout_logprobs, batch.advantages, batch.loss_weights)
        tokens = batch.input_ids[starts[i] : starts[i + 1]]
        out.append((tuple(tokens.tolist()), *(tuple(field[mine].tolist()) for field in fields)))
    return out


def as_packed(sequence: Sequence, weight: float) -> tuple[object, ...]:
    """What `taken_apart` must give for a sequence."""
    length = sequence.completion_length
    return (
        tuple(sequence.token_ids.tolist()),
        tuple(sequence.token_ids[sequence.prompt_length :].tolist()),
        tuple(sequence.rollout_logprobs.tolist()),
        (float(np.float32(sequence.advantage)),) * length,
        (float(np.float32(weight)),) * length,
    )


def test_a_micro_batch_of_two_sequences_is_what_its_fields_say() -> None:
    batch = build_micro_batch([make_sequence([1, 2], [3, 4], 0.5), make_sequence([5], [6], -2.0)], [0.25, 0.0])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.predictor_positions.tolist() == [1, 2, 4]
    assert batch.target_ids.tolist() == [3, 4, 6]
    assert batch.sequence_index.tolist() == [0, 0, 1]
    assert batch.num_sequences == 2
    assert batch.advantages.tolist() == [0.5, 0.5, -2.0]
    assert batch.rollout_logprobs.tolist() == [-3 / 8, -4 / 8, -6 / 8]
    assert batch.loss_weights.tolist() == [0.25, 0.25, 0.0]
    types = [getattr(batch, name).dtype for name in ("input_ids", "position_ids", "predictor_positions", "target_ids")]
    assert types == [torch.int64] * 4
    assert batch.sequence_index.dtype == torch.int64
    assert batch.advantages.dtype == batch.rollout_logprobs.dtype == batch.loss_weights.dtype == torch.float32


@quick
@given(sequences_of_step, st.integers(1, 30))
def test_every_completion_token_appears_exactly_once_in_a_packing(sequences: list[Sequence], max_tokens: int) -> None:
    weights = weights_of(sequences)
    batches = pack(sequences, weights, max_tokens)
    packed = [sequence for batch in batches for sequence in taken_apart(batch)]
    expected = [as_packed(s, w) for s, w in zip(sequences, weights, strict=True)]
    assert sorted(packed, key=repr) == sorted(expected, key=repr)
    for batch in batches:
        assert batch.num_sequences == 1 or batch.num_tokens <= max_tokens


@quick
@given(sequences_of_step, st.integers(1, 30))
def test_each_target_follows_its_predictor(sequences: list[Sequence], max_tokens: int) -> None:
    for batch in pack(sequences, weights_of(sequences), max_tokens):
        assert torch.equal(batch.input_ids[batch.predictor_positions + 1], batch.target_ids)
        assert torch.equal(batch.position_ids[batch.predictor_positions + 1] > 0, torch.ones_like(batch.target_ids) > 0)


def surrogate_gradient(batches: list[MicroBatch]) -> torch.Tensor:
    """The gradient of a tiny bigram model's summed loss over the micro-batches."""
    table = torch.linspace(-1, 1, 1001 * 3, dtype=torch.float64).reshape(1001, 3).requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        logprobs = table[batch.input_ids[batch.predictor_positions]].log_softmax(-1)
        chosen = logprobs.gather(1, batch.target_ids[:, None] % 3).squeeze(1)
        total = total - (batch.loss_weights * batch.advantages * chosen).sum()
    return torch.autograd.grad(total, table)[0]


@quick
@given(sequences_of_step, st.integers(1, 30), st.sampled_from(sorted(LOSSES)))
def test_the_gradient_does_not_depend_on_the_budget(sequences: list[Sequence], max_tokens: int, loss_type: str) -> None:
    weights = weights_of(sequences, loss_type)
    whole = surrogate_gradient(pack(sequences, weights, 10**6))
    cut = surrogate_gradient(pack(sequences, weights, max_tokens))
    torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-12)


def test_weights_per_micro_batch_would_make_the_gradient_depend_on_the_budget() -> None:
    sequences = [make_sequence([7], [1]), make_sequence([8], [2, 3, 4, 5])]
    whole = surrogate_gradient(pack(sequences, weights_of(sequences), 100))
    alone = surrogate_gradient([build_micro_batch([s], [w / 2 for w in weights_of([s])]) for s in sequences])
    assert not torch.allclose(alone, whole)  # the control of the test above


@quick
@given(sequences_of_step)
def test_a_filler_is_the_shortest_sequence_and_adds_exactly_nothing(sequences: list[Sequence]) -> None:
    filler = build_filler(sequences)
    assert filler.num_tokens == min(len(s.token_ids) for s in sequences)
    assert filler.num_sequences == 1
    assert (filler.loss_weights == 0).all()
    assert (surrogate_gradient([filler]) == 0).all()


def test_a_micro_batch_owns_its_memory() -> None:
    sequence = make_sequence([1], [2])
    batch = build_micro_batch([sequence], [1.0])
    sequence.token_ids[:] = 0
    sequence.rollout_logprobs[:] = 0
    assert batch.input_ids.tolist() == [1, 2]
    assert batch.rollout_logprobs.tolist() == [-0.25]


def test_a_sequence_without_a_prompt_cannot_be_packed() -> None:
    with pytest.raises(AssertionError, match="prompt_length 0"):
        build_micro_batch([make_sequence([], [1])], [1.0])


@given(sequences_of_step, st.data())
@quick
def test_what_an_environment_wrote_is_read_and_never_a_target(sequences: list[Sequence], data: st.DataObject) -> None:
    marks = [
        data.draw(st.lists(st.booleans(), min_size=s.completion_length, max_size=s.completion_length))
        for s in sequences
    ]
    mixed = [replace(s, by_policy=np.array(mark, dtype=np.bool_)) for s, mark in zip(sequences, marks, strict=True)]
    weights = [float(index + 1) for index in range(len(mixed))]
    found, whole = build_micro_batch(mixed, weights), build_micro_batch(sequences, weights)
    kept = torch.tensor([mark for marks_of_one in marks for mark in marks_of_one], dtype=torch.bool)
    assert torch.equal(found.input_ids, whole.input_ids) and torch.equal(found.position_ids, whole.position_ids)
    for name in (
        "predictor_positions",
        "target_ids",
        "sequence_index",
        "advantages",
        "rollout_logprobs",
        "loss_weights",
    ):
        assert torch.equal(getattr(found, name), getattr(whole, name)[kept]), name
    assert [s.num_targets for s in mixed] == [sum(mark) for mark in marks]
