"""Reward functions that fail during a run, and those that run in processes of their own."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from shoal.errors import ConfigError, RewardError
from shoal.observe.completions import read_completions
from shoal.trainer.groups import failure_metrics
from shoal.trainer.judge import MOST_EMPTY_STEPS
from shoal.types import Prompt, RewardFailure, Rollout, ScoredGroup

MakeTrainer = Callable[..., Any]
DROP: dict[str, Any] = {"reward_on_error": "drop"}


def steps(trainer: Any) -> list[dict[str, Any]]:
    """The log's lines about training steps."""
    return [line for line in trainer.state.log_history if "loss" in line]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def moved(before: dict[str, torch.Tensor], trainer: Any) -> bool:
    return any(not torch.equal(before[name], value) for name, value in weights(trainer).items())


def failing_when(fails: Callable[[Any], bool]) -> Callable[..., list[float]]:
    """A reward that fails while it depends on the trainer's state; the check before training has none."""

    def flaky(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        if trainer_state is not None and fails(trainer_state):
            raise ConnectionError("the judge is away")
        return [float(ids[0] % 7) for ids in completion_ids]

    return flaky


def test_failures_are_counted_by_function_and_by_what_is_left(make_trainer: MakeTrainer) -> None:
    calls = 0

    def first_call_raises(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        nonlocal calls
        if trainer_state is not None:
            calls += 1
            if calls == 1:
                raise ValueError("no")
        return [1.0] * len(completion_ids)

    async def second_hangs_once(completion_ids: list[list[int]], prompts: list[str], **_: Any) -> list[float]:
        if prompts[0] == "a":
            import asyncio

            await asyncio.sleep(600)
        return [float(ids[0]) for ids in completion_ids]

    def infinite_for_one(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [np.inf, *[0.0] * (len(completion_ids) - 1)]

    trainer = make_trainer(
        rewards=[first_call_raises, second_hangs_once, infinite_for_one],
        prompts=["a", "b"],
        max_steps=1,
        reward_timeout_s=1.0,
        reward_preflight=False,
        **DROP,
    )
    trainer.train()
    line = steps(trainer)[0]
    assert line["rewards/first_call_raises/errors"] == 1 and line["rewards/first_call_raises/timeouts"] == 0
    assert line["rewards/second_hangs_once/errors"] == 1 and line["rewards/second_hangs_once/timeouts"] == 1
    assert line["rewards/infinite_for_one/errors"] == 2 and line["rewards/infinite_for_one/timeouts"] == 0
    # Which group the first call was for is chance: one group or both are lost, the other loses a sample.
    assert (line["rollout/dropped_groups"], line["rollout/dropped_samples"]) in [(1, 5), (2, 8)]


def test_the_reward_is_that_of_what_is_left(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    def one_is_missing(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float("nan"), 1.0, 2.0, 6.0]

    def style(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [100.0, 0.0, 0.0, 0.0]

    trainer = make_trainer(
        rewards=[one_is_missing, style], max_steps=1, log_completions=True, reward_preflight=False, **DROP
    )
    trainer.train()
    line = steps(trainer)[0]
    assert line["reward"] == 3.0 and line["rollout/dropped_samples"] == 2 and line["rollout/dropped_groups"] == 0
    assert line["rewards/one_is_missing/mean"] == 3.0 and line["rewards/style/mean"] == 25.0
    rows = read_completions(Path(settings["output_dir"]) / "completions")
    spread = np.std([1, 2, 6], ddof=1) + 1e-4
    for row in rows:
        if row["rewards/style"] == 100.0:
            assert row["reward"] is None and row["advantage"] is None
        else:
            assert row["advantage"] == pytest.approx((row["reward"] - 3.0) / spread)
    assert sum(row["reward"] is None for row in rows) == 2


def test_steps_of_which_nothing_is_left_keep_the_weights_despite_momentum_and_decay(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(
        rewards=failing_when(lambda state: state.global_step == 1),
        weight_decay=0.1,
        adam_beta1=0.99,
        max_steps=2,
        lr_scheduler_type="constant",
        **DROP,
    )
    seen: list[dict[str, torch.Tensor]] = [weights(trainer)]
    publish = trainer.publish_after_step

    def noting() -> None:
        seen.append(weights(trainer))
        publish()

    trainer.publish_after_step = noting
    trainer.train()
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in seen[0])  # the first step did train
    assert all(torch.equal(seen[1][name], seen[2][name]) for name in seen[1])
    assert [line["rollout/dropped_groups"] for line in steps(trainer)] == [0, 2]
    assert steps(trainer)[1]["reward"] is None and steps(trainer)[1]["grad_norm"] == 0.0
    assert trainer.rollouts.published == [0, 1, 2]


def test_several_such_steps_in_a_row_are_an_error_that_says_why(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(rewards=failing_when(lambda state: state.global_step >= 1), max_steps=50, **DROP)
    with pytest.raises(RewardError, match=rf"{MOST_EMPTY_STEPS} steps in a row.*the judge is away.*resume"):
        trainer.train()
    assert trainer.state.global_step == MOST_EMPTY_STEPS


def test_steps_that_are_lost_now_and_then_are_not(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        rewards=failing_when(lambda state: state.global_step % MOST_EMPTY_STEPS != 0),
        max_steps=3 * MOST_EMPTY_STEPS,
        **DROP,
    )
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 3 * MOST_EMPTY_STEPS and moved(before, trainer)


def test_a_function_that_never_works_is_an_error_before_training_whatever_the_policy(
    make_trainer: MakeTrainer,
) -> None:
    with pytest.raises(RewardError, match="check before training"):
        make_trainer(rewards=lambda **_: [1.0], **DROP)


def test_evaluation_leaves_out_what_failed(make_trainer: MakeTrainer) -> None:
    def fails_on_a(completion_ids: list[list[int]], prompts: list[str], **_: Any) -> list[float]:
        if prompts[0] == "a":
            raise ValueError("a")
        return [5.0] * len(completion_ids)

    trainer = make_trainer(
        rewards=fails_on_a,
        eval_dataset=Dataset.from_dict({"prompt": ["a", "b", "c"]}),
        num_generations_eval=1,
        reward_preflight=False,
        **DROP,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == 5.0 and metrics["eval_rollout/dropped_groups"] == 1
    assert metrics["eval_rewards/fails_on_a/errors"] == 1


def test_a_flood_of_failures_is_logged_once_in_a_hundred(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(rewards=failing_when(lambda state: True), prompts="abcdefghij", max_steps=2, **DROP)
    with caplog.at_level(logging.WARNING, logger="shoal.rewards.failures"):
        trainer.train()
    told = [record.getMessage() for record in caplog.records if record.name == "shoal.rewards.failures"]
    assert len(told) == 1 and "the judge is away" in told[0] and "reward_on_error='drop'" in told[0]


def test_a_lone_sample_that_remains_is_left_out_with_its_group() -> None:
    one = np.zeros(1, dtype=np.float32)
    rollout = Rollout(
        token_ids=one.astype(np.int32), rollout_logprobs=one, finish_reason="stop", weight_version=0, engine="e"
    )

    def group(*failed: int) -> ScoredGroup:
        failure = RewardFailure(function="f", kind="timeout", samples=failed, message="m")
        return ScoredGroup(
            prompt=Prompt(row=0, prompt="p", token_ids=(1,), columns={}),
            rollouts=(rollout,) * 3,
            completions=("c",) * 3,
            rewards=np.zeros((3, 1)),
            extras={},
            failures=(failure,) if failed else (),
        )

    assert group().dropped.tolist() == [False] * 3
    assert group(1).dropped.tolist() == [False, True, False]
    assert group(0, 2).dropped.tolist() == [True] * 3
    assert failure_metrics([group(), group(1), group(0, 2)], ["f", "g"]) == {
        "rewards/f/errors": 2,
        "rewards/f/timeouts": 2,
        "rewards/g/errors": 0,
        "rewards/g/timeouts": 0,
        "rollout/dropped_samples": 4,
        "rollout/dropped_groups": 1,
    }


# ---- in processes of their own ----


def pid_reward() -> Callable[..., list[float]]:
    def reward(completion_ids: list[list[int]], trainer_state: Any, log_metric: Any, **_: Any) -> list[float]:
        log_metric("pid", os.getpid())
        log_metric("step", trainer_state.global_step if trainer_state is not None else -1)
        return [float(ids[0] % 7) for ids in completion_ids]

    return reward


def test_training_with_workers_is_training_with_threads(make_trainer: MakeTrainer) -> None:
    trained = []
    for num_workers in (0, 2):
        trainer = make_trainer(rewards=pid_reward(), reward_workers=num_workers)
        trainer.train()
        trained.append((weights(trainer), [line["reward"] for line in steps(trainer)], steps(trainer)))
    (threads, rewards, on_threads), (workers, same_rewards, in_workers) = trained
    assert rewards == same_rewards
    assert all(torch.equal(threads[name], workers[name]) for name in threads)
    assert on_threads[0]["pid"] == os.getpid() != in_workers[0]["pid"]
    assert [line["step"] for line in in_workers] == [line["step"] for line in on_threads]


def test_workers_end_with_the_trainer_and_start_again_with_it(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(rewards=pid_reward(), reward_workers=1, max_steps=1)
    trainer.train()
    first = int(steps(trainer)[0]["pid"])
    trainer.close()
    assert not Path(f"/proc/{first}").exists()
    trainer.train()
    assert int(steps(trainer)[-1]["pid"]) not in (first, os.getpid())


def test_a_hang_costs_its_group_and_training_goes_on(make_trainer: MakeTrainer) -> None:
    def hangs_once(completion_ids: list[list[int]], prompts: list[str], **_: Any) -> list[float]:
        if prompts[0] == "a":
            time.sleep(600)
        return [float(ids[0] % 7) for ids in completion_ids]

    trainer = make_trainer(
        rewards=hangs_once,
        prompts=["a", "b"],
        max_steps=2,
        reward_workers=1,
        reward_timeout_s=3.0,
        reward_preflight=False,
        **DROP,
    )
    before = weights(trainer)
    trainer.train()
    assert [line["rewards/hangs_once/timeouts"] for line in steps(trainer)] == [1, 1]
    assert [line["rollout/dropped_groups"] for line in steps(trainer)] == [1, 1]
    assert moved(before, trainer)


def test_a_function_that_no_worker_can_have_is_refused_before_anything_starts(make_trainer: MakeTrainer) -> None:
    import threading

    lock = threading.Lock()

    def holds(**_: Any) -> list[float]:
        with lock:
            return []

    with pytest.raises(ConfigError, match="'holds' cannot be sent to a worker process"):
        make_trainer(rewards=holds, reward_workers=1)
