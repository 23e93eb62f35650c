"""Evaluation judges the current weights, greedily if asked, and leaves the training alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from shoal.engines.reference import ReferenceEngine
from shoal.testing import tiny_tokenizer
from shoal.types import RolloutRequest, SamplingSettings

MakeTrainer = Callable[..., Any]


def steps(trainer: Any) -> list[dict[str, Any]]:
    """The log's lines about training steps."""
    return [line for line in trainer.state.log_history if "loss" in line]


def greedy_reward(model: Any, prompts: list[str]) -> float:
    """The mean reward of greedy completions, written one by one."""
    sampling = SamplingSettings(temperature=0.0, max_tokens=4, stop_token_ids=(2,))
    engine = ReferenceEngine(model.eval())
    completions = [
        engine.complete(
            RolloutRequest(prompt_token_ids=tuple(tiny_tokenizer()(prompt).input_ids), seed=0, sampling=sampling)
        )
        for prompt in prompts
    ]
    return float(np.mean([np.mean(completion.token_ids < 130) for completion in completions]))


def test_greedy_evaluation_is_the_reward_of_the_greedy_completions(make_trainer: MakeTrainer) -> None:
    prompts = [f"question {index}" for index in range(6)]
    trainer = make_trainer(
        eval_dataset=Dataset.from_dict({"prompt": prompts}), eval_temperature=0.0, num_generations_eval=2
    )
    before = trainer.evaluate()
    assert before["eval_reward"] == before["eval_rewards/low_bytes/mean"] == greedy_reward(trainer.model, prompts)
    assert trainer.evaluate() == before
    assert before["eval_frac_reward_zero_std"] == 1.0
    # Outside of training the weights may have changed since, so each evaluation publishes them.
    assert trainer.rollouts.published == [0, 0]


def test_sampled_evaluation_has_differences_within_groups(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(eval_dataset=Dataset.from_dict({"prompt": list("abcdef")}))
    assert trainer.evaluate()["eval_frac_reward_zero_std"] < 1.0


def test_evaluation_uses_the_weights_of_the_last_step(make_trainer: MakeTrainer) -> None:
    prompts = list("abcdef")
    trainer = make_trainer(eval_dataset=Dataset.from_dict({"prompt": prompts}), eval_temperature=0.0, learning_rate=0.1)
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    assert after == greedy_reward(trainer.model, prompts) and after != before


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_evaluation_during_training_changes_neither_the_training_nor_its_log(
    make_trainer: MakeTrainer, logging_steps: int
) -> None:
    dataset = Dataset.from_dict({"prompt": list("xyz")})
    every = {"max_steps": 4, "logging_steps": logging_steps}
    with_evaluation = make_trainer(eval_dataset=dataset, eval_strategy="steps", eval_steps=1, **every)
    without = make_trainer(**every)
    for trainer in (with_evaluation, without):
        trainer.train()
    evaluated = [line for line in with_evaluation.state.log_history if "eval_reward" in line]
    assert [line["step"] for line in evaluated] == [1, 2, 3, 4]
    assert not any(name.startswith(("reward", "entropy")) for line in evaluated for name in line)
    assert len(steps(with_evaluation)) == 4 // logging_steps
    for one, other in zip(steps(with_evaluation), steps(without), strict=True):
        timed = ("seconds/", "rollout/")
        assert {n: v for n, v in one.items() if not n.startswith(timed)} == {
            n: v for n, v in other.items() if not n.startswith(timed)
        }


def test_an_evaluations_metrics_take_the_prefix_that_is_asked_for(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.train()
    metrics = trainer.evaluate(Dataset.from_dict({"prompt": ["a"]}), metric_key_prefix="test")
    assert all(name.startswith("test_") for name in metrics) and 0 <= metrics["test_reward"] <= 1
    assert set(trainer.state.log_history[-1]) == {*metrics, "epoch", "step"}


def test_the_best_model_is_published_before_it_is_evaluated(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        eval_dataset=Dataset.from_dict({"prompt": list("abcdef")}),
        eval_temperature=0.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        learning_rate=0.1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
    )
    trainer.train()
    evaluated = [line["eval_reward"] for line in trainer.state.log_history if "eval_reward" in line]
    assert trainer.state.best_metric == max(evaluated)
    assert trainer.evaluate()["eval_reward"] == max(evaluated)
    # Its weights are not those that the engines were sent after step 3, although no step has followed.
    assert trainer.rollouts.published == [0, 1, 2, 3, 3]
