"""What reward functions are given, and what is logged: TRL's names, with the values that they stand for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from shoal.observe.completions import read_completions
from shoal.observe.metrics import read_metrics
from shoal.testing import tiny_model, tiny_tokenizer
from shoal.testing.trainer import ReferenceTrainer

MakeTrainer = Callable[..., Any]

# Names of TRL 1.16 (`self._metrics[mode][...]` in its grpo_trainer.py) whose meaning is the same here. What else it
# has belongs to settings that Shoal lacks, but for `clip_ratio/low_min` and `high_max`, which are extremes over ranks.
TRL_NAMES = {
    "num_tokens",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "completions/mean_terminated_length",
    "completions/min_terminated_length",
    "completions/max_terminated_length",
    "rewards/low_bytes/mean",
    "rewards/low_bytes/std",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max",
    "entropy",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
}
TRANSFORMERS_NAMES = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
OWN_NAMES = {"seconds/generate", "seconds/train", "seconds/publish", "rollout/tokens_per_s"}


class Seen:
    """A reward function that keeps everything it was called with in training."""

    def __init__(self, reward: Callable[[list[int]], float] = lambda ids: sum(ids) / len(ids) / 300) -> None:
        self.calls: list[dict[str, Any]] = []
        self.rewards: list[float] = []
        self._reward = reward

    def __call__(self, **keywords: Any) -> list[float]:
        rewards = [self._reward(ids) for ids in keywords["completion_ids"]]
        if keywords["trainer_state"] is not None:
            self.calls.append(keywords)
            self.rewards.extend(rewards)
        return rewards


def steps(trainer: Any) -> list[dict[str, Any]]:
    """The log's lines about training steps."""
    return [line for line in trainer.state.log_history if "loss" in line]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


# ---- what rewards are given ----


def test_rewards_get_the_other_columns_and_the_state(make_trainer: MakeTrainer) -> None:
    seen = Seen()
    rows = [{"prompt": f"{a}+{b}=", "answer": a + b, "tags": ["sum", str(a)]} for a in range(3) for b in range(3)]
    make_trainer(rewards=seen, train_dataset=Dataset.from_list(rows)).train()
    for call in seen.calls:
        assert call["prompts"] == [call["prompts"][0]] * 4
        a, b = call["prompts"][0].removesuffix("=").split("+")
        assert call["answer"] == [int(a) + int(b)] * 4 and call["tags"] == [["sum", a]] * 4
        assert [len(ids) for ids in call["completion_ids"]] == [4] * 4
        assert call["completions"] == tiny_tokenizer().batch_decode(call["completion_ids"], skip_special_tokens=True)
    assert len({call["prompts"][0] for call in seen.calls}) == 4


def test_conversations_are_completed_by_an_assistants_message(make_trainer: MakeTrainer) -> None:
    seen = Seen()
    prompts = [[{"role": "user", "content": letter}] for letter in "abcd"]
    trainer = make_trainer(rewards=seen, prompts=prompts, max_steps=1)
    trainer.train()
    for call in seen.calls:
        texts = tiny_tokenizer().batch_decode(call["completion_ids"], skip_special_tokens=True)
        assert call["completions"] == [[{"role": "assistant", "content": text}] for text in texts]
        assert call["prompts"][0] in prompts
    rendered = len("user: a\nassistant: ")
    assert steps(trainer)[0]["num_tokens"] == 8 * (rendered + 4)


# ---- what is logged ----


def test_metrics_have_the_names_of_trl(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(beta=0.1)
    trainer.train()
    assert set(steps(trainer)[0]) == TRL_NAMES | TRANSFORMERS_NAMES | OWN_NAMES


def test_metrics_say_what_the_rewards_saw(make_trainer: MakeTrainer) -> None:
    seen = Seen()
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(2, 60))
    trainer = make_trainer(rewards=seen, model=model, prompts=["a", "bc", "def", "ghij"], max_completion_length=6)
    trainer.train()
    num_tokens, cut = 0, []
    for step, line in enumerate(steps(trainer)):
        calls = seen.calls[2 * step : 2 * step + 2]
        ids = [completion for call in calls for completion in call["completion_ids"]]
        lengths = np.array([len(completion) for completion in ids])
        ended = np.array([completion[-1] in range(2, 60) for completion in ids])
        rewards = seen.rewards[8 * step : 8 * step + 8]
        num_tokens += sum(len(call["prompts"][0]) * 4 for call in calls) + int(lengths.sum())
        cut.append(int((~ended).sum()))
        expected = {
            "reward": np.mean(rewards),
            "reward_std": np.std(rewards, ddof=1),
            "rewards/Seen/mean": np.mean(rewards),
            "rewards/Seen/std": np.std(rewards, ddof=1),
            "frac_reward_zero_std": 0.0,
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": 1 - ended.mean(),
            "completions/mean_terminated_length": lengths[ended].mean(),
            "completions/min_terminated_length": lengths[ended].min(),
            "completions/max_terminated_length": lengths[ended].max(),
            "num_tokens": num_tokens,
        }
        assert {name: line[name] for name in expected} == pytest.approx(expected)
    assert 0 < sum(cut) < 16


def test_the_exact_engine_agrees_with_the_trainer_so_its_corrections_are_one(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=3)
    trainer.train()
    for line in steps(trainer):
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-4)
        assert line["clip_ratio/region_mean"] == 0


def test_a_trainer_at_another_temperature_than_the_engine_would_show_in_the_log(make_trainer: MakeTrainer) -> None:
    class Mistaken(ReferenceTrainer):
        def score(self, prompts: Any, *, temperature: float, **keywords: Any) -> Any:
            return super().score(prompts, temperature=2 * temperature, **keywords)

    trainer = make_trainer(kind=Mistaken, max_steps=1)
    trainer.train()
    assert steps(trainer)[0]["sampling/sampling_logp_difference/mean"] > 0.1


def test_groups_without_differences_are_counted_and_teach_nothing(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(rewards=lambda completions, **_: [0.3] * len(completions), max_steps=1)
    before = weights(trainer)
    trainer.train()
    assert steps(trainer)[0]["frac_reward_zero_std"] == 1.0
    assert steps(trainer)[0]["grad_norm"] == 0.0
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_rewards_are_added_up_with_their_weights_and_none_is_left_out(make_trainer: MakeTrainer) -> None:
    def some(completions: list[str], **_: Any) -> list[float | None]:
        return [1.0, None] * (len(completions) // 2)

    def never(completions: list[str], **_: Any) -> list[None]:
        return [None] * len(completions)

    async def two(completions: list[str], **_: Any) -> list[float]:
        return [2.0] * len(completions)

    trainer = make_trainer(rewards=[some, never, two], reward_weights=[1.0, 5.0, 0.25], max_steps=1)
    trainer.train()
    line = steps(trainer)[0]
    assert line["rewards/some/mean"] == 1.0 and line["rewards/two/mean"] == 2.0
    assert line["rewards/never/mean"] is None
    assert line["reward"] == (1.5 + 0.5) / 2


def test_steps_between_logs_are_averaged(make_trainer: MakeTrainer) -> None:
    logs = {}
    for every in (1, 2):
        trainer = make_trainer(max_steps=4, logging_steps=every)
        trainer.train()
        logs[every] = steps(trainer)
    for name in ("reward", "entropy", "completions/mean_length", "sampling/importance_sampling_ratio/min"):
        single = [line[name] for line in logs[1]]
        assert [line[name] for line in logs[2]] == pytest.approx([np.mean(single[:2]), np.mean(single[2:])])


def test_the_metrics_file_holds_what_was_logged(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    trainer = make_trainer(eval_dataset=Dataset.from_dict({"prompt": ["a", "b"]}), eval_strategy="steps", eval_steps=2)
    trainer.train()
    lines = read_metrics(Path(settings["output_dir"]) / "metrics.jsonl")
    assert [{name: value for name, value in line.items() if name != "time"} for line in lines] == [
        {name: value for name, value in line.items() if name != "step"} | {"step": line["step"]}
        for line in trainer.state.log_history
    ]


def test_metrics_and_columns_that_rewards_log_arrive(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    def reward(completion_ids: list[list[int]], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        log_metric("longest", max(len(ids) for ids in completion_ids))
        log_extra("first token", [ids[0] for ids in completion_ids])
        return [float(ids[0] % 7) for ids in completion_ids]

    trainer = make_trainer(rewards=reward, log_completions=True)
    trainer.train()
    assert [line["longest"] for line in steps(trainer)] == [4.0, 4.0]
    rows = read_completions(Path(settings["output_dir"]) / "completions")
    assert [row["step"] for row in rows] == [0] * 8 + [1] * 8
    for row in rows:
        assert row["reward"] == row["rewards/reward"] == json.loads(row["extras"])["first token"] % 7
        assert row["weight_version"] == row["step"] and row["engine"] == "reference" and row["num_tokens"] == 4
    for _, group in itertools.groupby(rows, key=lambda row: (row["step"], row["row"])):
        found = list(group)
        rewards = np.array([row["reward"] for row in found])
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        assert [row["advantage"] for row in found] == pytest.approx(expected)
