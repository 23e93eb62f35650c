"""Several optimizer steps on one batch: whose logprobs the ratio is of, when engines write, and when they publish."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from shoal.data.micro_batch import build_micro_batch
from shoal.testing import tiny_model
from shoal.testing.sequences import random_sequences
from shoal.testing.trainer import ReferenceTrainer
from shoal.trainer.held_batch import HeldBatch, Part, deal
from shoal.types import MicroBatch, Sequence

MakeTrainer = Callable[..., Any]


class Watching(ReferenceTrainer):
    """Notes the weights before each optimizer step, and what each of its micro-batches was."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.seen: list[list[MicroBatch]] = []
        self.written: list[int] = []
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, *args: Any) -> Any:
        if self.state.global_step == len(self.weights):
            self.weights.append({name: value.detach().clone() for name, value in self.model.state_dict().items()})
            self.seen.append([])
        return super().get_batch_samples(*args)

    def compute_loss(self, model: Any, inputs: MicroBatch, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen[-1].append(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _write_batch(self, number: int) -> list[Sequence]:
        self.written.append(self.state.global_step)
        return super()._write_batch(number)


def logprobs(weights: dict[str, torch.Tensor], micro_batch: MicroBatch) -> torch.Tensor:
    """Compute a micro-batch's logprobs one sequence at a time, by transformers alone."""
    model = tiny_model()
    model.load_state_dict(weights)
    starts = [*torch.nonzero(micro_batch.position_ids == 0)[:, 0].tolist(), micro_batch.num_tokens]
    with torch.no_grad():
        rows = [
            model(input_ids=micro_batch.input_ids[start:stop][None]).logits[0].log_softmax(-1)
            for start, stop in itertools.pairwise(starts)
        ]
    return torch.cat(rows)[micro_batch.predictor_positions].gather(1, micro_batch.target_ids[:, None])[:, 0]


def tokens(step: list[MicroBatch]) -> list[list[int]]:
    return [item.input_ids.tolist() for item in step]


def test_a_batch_is_gone_through_again_with_the_logprobs_of_before_its_first_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        kind=Watching, num_iterations=3, max_steps=6, learning_rate=1e-2, gradient_accumulation_steps=2
    )
    trainer.train()
    assert trainer.written == [0, 3]
    assert trainer.rollouts.published == [0, 3, 6]
    for step, seen in enumerate(trainer.seen):
        first = step - step % 3
        assert tokens(seen) == tokens(trainer.seen[first])
        for item in seen:
            if step == first:
                assert item.old_logprobs is None
                continue
            assert item.old_logprobs is not None
            assert torch.allclose(item.old_logprobs, logprobs(trainer.weights[first], item), atol=1e-5)
            # The control: the weights have changed since, and would have given others.
            assert not torch.allclose(item.old_logprobs, logprobs(trainer.weights[step], item), atol=1e-3)
    assert tokens(trainer.seen[0]) != tokens(trainer.seen[3])


def test_a_batch_of_two_steps_is_shared_out_and_the_second_steps_ratio_is_to_the_policy_that_wrote_it(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(kind=Watching, steps_per_generation=2, num_iterations=2, max_steps=8, learning_rate=1e-2)
    trainer.train()
    assert trainer.written == [0, 4] and trainer.rollouts.published == [0, 4, 8]
    one, other = (sum(len(set(item.sequence_index.tolist())) for item in seen) for seen in trainer.seen[:2])
    assert (one, other) == (8, 8)
    assert tokens(trainer.seen[0]) != tokens(trainer.seen[1])
    assert [tokens(seen) for seen in trainer.seen[:2]] == [tokens(seen) for seen in trainer.seen[2:4]]
    assert all(item.old_logprobs is None for item in trainer.seen[0])
    for seen in trainer.seen[1:4]:
        for item in seen:
            assert item.old_logprobs is not None
            assert torch.allclose(item.old_logprobs, logprobs(trainer.weights[0], item), atol=1e-5)


def test_against_the_engines_logprobs_none_of_the_trainers_are_kept(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        kind=Watching,
        steps_per_generation=2,
        num_iterations=2,
        max_steps=4,
        old_logprobs="rollout",
        vllm_importance_sampling_correction=False,
    )
    trainer.train()
    assert all(item.old_logprobs is None for seen in trainer.seen for item in seen)


def test_a_run_that_is_resumed_within_a_batch_has_it_written_anew(make_trainer: MakeTrainer, settings: Any) -> None:
    changes = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 3}
    make_trainer(kind=Watching, max_steps=3, **changes).train()
    resumed = make_trainer(kind=Watching, max_steps=6, **changes)
    resumed.state.global_step = 3
    resumed.weights, resumed.seen = [{}] * 3, [[]] * 3
    resumed.train(resume_from_checkpoint=True)
    assert resumed.written == [3, 4] and resumed.state.global_step == 6
    assert all(item.old_logprobs is None for step in (3, 4) for item in resumed.seen[step])
    assert all(item.old_logprobs is not None for item in resumed.seen[5])


def test_an_epoch_has_as_many_steps_as_the_batches_are_used_for(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=-1, num_train_epochs=1, num_iterations=2, generation_batch_size=16)
    trainer.train()
    # 8 prompts are two batches of 4 prompts x 4 completions, each of two steps, taken twice.
    assert trainer.state.global_step == 8 and trainer.state.epoch == 1.0


def part() -> Part:
    sequences = random_sequences()
    return Part(micro_batches=[build_micro_batch(sequences, [1.0] * len(sequences))], is_empty=False)


@pytest.mark.parametrize(("num_parts", "num_iterations", "step", "computed"), [
    (1, 1, 5, 0), (1, 4, 4, 0), (3, 1, 0, 2), (3, 1, 1, 1), (3, 1, 2, 0), (3, 2, 2, 2), (3, 2, 4, 1),
])  # fmt: skip
def test_logprobs_are_computed_beforehand_only_for_parts_that_come_after_an_update(
    num_parts: int, num_iterations: int, step: int, computed: int
) -> None:
    calls = []

    def old(item: MicroBatch) -> torch.Tensor:
        calls.append(item)
        return torch.zeros_like(item.loss_weights)

    held = HeldBatch(num_parts=num_parts, num_iterations=num_iterations, wants_old_logprobs=True)
    held.fill(step, [part() for _ in range(num_parts)], old)
    assert len(calls) == computed
    assert held.part(step).micro_batches[0].old_logprobs is None


def test_all_ranks_deal_alike_every_sequence_once_and_every_part_gets_something() -> None:
    sequences = random_sequences() * 5
    one, again = (deal(sequences, 4, seed=3, number=7) for _ in range(2))
    other = deal(sequences, 4, seed=3, number=8)
    flat = [[id(item) for share in shares for item in share] for shares in (one, again, other)]
    assert flat[0] == flat[1] != flat[2]
    assert sorted(flat[0]) == sorted(map(id, sequences)) and max(map(len, one)) - min(map(len, one)) <= 1
    lonely = deal(sequences[:1], 3, seed=0, number=0)
    assert [len(share) for share in lonely] == [1, 1, 1]
    assert [share[0].in_loss for share in lonely].count(True) == int(sequences[0].in_loss)
    assert np.array_equal(lonely[2][0].token_ids, sequences[0].token_ids)
