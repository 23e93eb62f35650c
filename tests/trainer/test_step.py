"""A step is cut into the same number of passes everywhere, with nothing lost, doubled or weighed anew."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import GRPOConfig
from shoal.algorithm.losses import LOSSES, LossSettings
from shoal.algorithm.objective import CorrectionSettings, ObjectiveSettings
from shoal.algorithm.truncation import Truncation
from shoal.data.micro_batch import build_micro_batch
from shoal.trainer.step import (
    micro_batches_of_rank,
    objective_settings,
    parts_of_rank,
    sampling_filters,
    skips_zero_advantages,
    spread,
    to_device,
    truncation,
)
from shoal.types import MicroBatch, Sequence


def make_sequences(lengths: list[tuple[int, int]], masked: list[bool] | None = None) -> list[Sequence]:
    """Sequences whose tokens say which sequence they are of."""
    return [
        Sequence(
            token_ids=np.full(prompt + completion, index),
            prompt_length=prompt,
            advantage=float(index),
            rollout_logprobs=np.full(completion, -float(index), np.float32),
            in_loss=not (masked and masked[index]),
        )
        for index, (prompt, completion) in enumerate(lengths)
    ]


lengths_of_a_step = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=16)


@given(
    lengths=lengths_of_a_step,
    num_ranks=st.integers(1, 4),
    max_tokens=st.integers(1, 200),
    loss_type=st.sampled_from(sorted(LOSSES)),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_every_token_of_a_step_is_in_one_micro_batch_of_one_rank_with_its_weight(
    lengths: list[tuple[int, int]], num_ranks: int, max_tokens: int, loss_type: str, data: st.DataObject
) -> None:
    masked = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    sequences = make_sequences(lengths, masked)
    weights = LOSSES[loss_type].token_weights(
        np.array([completion for _, completion in lengths]), np.array([sequence.in_loss for sequence in sequences])
    )
    ranks = [
        micro_batches_of_rank(sequences, loss_type=loss_type, rank=rank, num_ranks=num_ranks, max_tokens=max_tokens)
        for rank in range(num_ranks)
    ]

    assert len({len(micro_batches) for micro_batches in ranks}) == 1 and len(ranks[0]) >= 1
    weighed: Counter[int] = Counter()
    total = 0.0
    for micro_batch in (batch for micro_batches in ranks for batch in micro_batches):
        assert micro_batch.num_tokens <= max_tokens or micro_batch.num_sequences == 1
        for index, weight in zip(micro_batch.target_ids.tolist(), micro_batch.loss_weights.tolist(), strict=True):
            if weight:
                weighed[index] += 1
                assert weight == np.float32(weights[index])
        total += float(micro_batch.loss_weights.double().sum())
    assert weighed == {i: n for i, (_, n) in enumerate(lengths) if sequences[i].in_loss}
    if loss_type == "dapo":
        assert total == pytest.approx(1.0 if weighed else 0.0, rel=1e-5)
    else:
        assert total == pytest.approx(len(weighed) / len(lengths), rel=1e-5)


def test_the_denominator_is_that_of_the_step_and_not_of_the_micro_batch() -> None:
    sequences = make_sequences([(1, 3), (1, 1)])
    cut = {
        loss_type: micro_batches_of_rank(sequences, loss_type=loss_type, rank=0, num_ranks=1, max_tokens=1)
        for loss_type in ("dapo", "grpo")
    }
    assert [batch.loss_weights.tolist() for batch in cut["dapo"]] == [[0.25] * 3, [0.25]]
    assert [batch.loss_weights.tolist() for batch in cut["grpo"]] == [[pytest.approx(1 / 6)] * 3, [0.5]]


def test_sequences_without_an_advantage_are_left_out_but_count_in_the_denominator() -> None:
    sequences = make_sequences([(1, 3), (1, 1), (2, 4)])  # the first one has advantage 0
    kept, skipped = (
        micro_batches_of_rank(sequences, loss_type="dapo", rank=0, num_ranks=1, max_tokens=1, skip_zero_advantages=skip)
        for skip in (False, True)
    )
    assert [batch.target_ids[0].item() for batch in skipped] == [2, 1] and len(kept) == 3
    assert {weight for batch in skipped for weight in batch.loss_weights.tolist()} == {np.float32(1 / 8)}


def test_a_step_of_nothing_but_such_sequences_is_a_filler_on_every_rank() -> None:
    sequences = [replace(sequence, advantage=0.0) for sequence in make_sequences([(1, 3), (2, 4)])]
    for rank in range(2):
        (filler,) = micro_batches_of_rank(
            sequences, loss_type="dapo", rank=rank, num_ranks=2, max_tokens=99, skip_zero_advantages=True
        )
        assert filler.target_ids.tolist() == [0, 0, 0] and not filler.loss_weights.any()


@pytest.mark.parametrize("masked", [False, True])
def test_each_step_on_a_batch_has_its_part_with_a_denominator_of_its_own(tmp_path: Path, masked: bool) -> None:
    args = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        num_generations=4,
        per_device_train_batch_size=8,
        steps_per_generation=2,
        loss_type="dapo",
        skip_zero_advantages=False,
    )
    sequences = make_sequences([(1, length) for length in (1, 2, 3, 4, 5)], [masked] * 5)
    parts = parts_of_rank(sequences, args, number=3, max_tokens=99)
    written = [sorted(set(batch.target_ids.tolist())) for part in parts for batch in part.micro_batches]
    assert sorted(map(len, written)) == [2, 3]
    assert sorted(index for part in written for index in part) == [0, 1, 2, 3, 4]
    for part in parts:
        assert part.is_empty == masked
        total = sum(float(batch.loss_weights.sum()) for batch in part.micro_batches)
        assert total == pytest.approx(0.0 if masked else 1.0)
    assert parts_of_rank(sequences, args, number=4, max_tokens=99)[0].micro_batches[0].target_ids.tolist() != (
        parts[0].micro_batches[0].target_ids.tolist()
    )  # another batch is divided otherwise


@given(num_micro_batches=st.integers(1, 40), num_items=st.integers(1, 12))
@settings(deadline=None)
def test_spreading_keeps_the_order_and_leaves_the_last_call_something(num_micro_batches: int, num_items: int) -> None:
    micro_batches: Any = list(range(num_micro_batches))
    calls = spread(micro_batches, num_items)
    assert len(calls) == num_items
    assert [batch for call in calls for batch in call] == micro_batches
    assert len(calls[-1]) >= 1
    filled = [len(call) for call in calls if call]
    assert max(filled) - min(filled) <= 1 and len(filled) == min(num_items, num_micro_batches)


def test_all_tensors_of_a_micro_batch_move_to_the_device_and_the_rest_stays() -> None:
    micro_batch = build_micro_batch(make_sequences([(2, 3), (1, 4)]), [0.5, 0.25])
    micro_batch = replace(micro_batch, old_logprobs=torch.zeros(7))
    moved = to_device(micro_batch, torch.device("meta"))
    tensors = [field.name for field in fields(MicroBatch) if field.name != "num_sequences"]
    assert {getattr(moved, name).device.type for name in tensors} == {"meta"}
    assert [getattr(moved, name).dtype for name in tensors] == [getattr(micro_batch, name).dtype for name in tensors]
    assert moved.num_sequences == 2
    same = to_device(micro_batch, torch.device("cpu"))
    assert all(torch.equal(getattr(same, name), getattr(micro_batch, name)) for name in tensors)


def test_the_objective_is_what_the_settings_say() -> None:
    args = GRPOConfig(
        output_dir="unused",
        loss_type="grpo",
        epsilon=0.1,
        epsilon_high=0.3,
        delta=2.0,
        importance_sampling_level="sequence",
        beta=0.04,
        use_bias_correction_kl=False,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_min=0.5,
        vllm_importance_sampling_clip_max=2.5,
    )
    assert objective_settings(args) == ObjectiveSettings(
        loss_type="grpo",
        loss=LossSettings(epsilon=0.1, epsilon_high=0.3, delta=2.0, importance_sampling_level="sequence"),
        beta=0.04,
        use_bias_correction_kl=False,
        correction=CorrectionSettings(mode="token_truncate", clip_min=0.5, clip_max=2.5),
    )


def test_sampling_filters_mean_the_same_to_engines_and_trainer() -> None:
    args = GRPOConfig(output_dir="unused", top_k=-1, top_p=0.9, min_p=None)
    assert sampling_filters(args) == {"top_k": 0, "top_p": 0.9, "min_p": 0.0}
    assert truncation(args) == Truncation(top_p=0.9)
    assert truncation(GRPOConfig(output_dir="unused")).is_off


def test_sequences_without_an_advantage_are_skipped_only_without_a_kl_term() -> None:
    assert skips_zero_advantages(GRPOConfig(output_dir="unused"))
    assert not skips_zero_advantages(GRPOConfig(output_dir="unused", beta=0.1))
    assert not skips_zero_advantages(GRPOConfig(output_dir="unused", skip_zero_advantages=False))


def test_what_the_settings_leave_open_is_symmetric_and_what_they_turn_off_is_off() -> None:
    objective = objective_settings(
        GRPOConfig(output_dir="unused", epsilon=0.15, vllm_importance_sampling_correction=False)
    )
    assert (objective.loss.epsilon, objective.loss.epsilon_high) == (0.15, 0.15)
    assert objective.correction is None
