"""One optimizer step of a real trainer, and what its optimizer saw; with torchrun, on several processes.

    python one_step.py CASES.json FOLDER

The rollouts are the exact engine's, their logprobs moved a little, as another engine's would differ.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

from shoal import GRPOConfig
from shoal.testing import tiny_model, tiny_tokenizer
from shoal.testing.trainer import ReferenceTrainer
from shoal.types import MicroBatch, Rollout, ScoredGroup

LEARNING_RATE = 0.5
# One prompt is long: two processes then get very different numbers of sequences, and one of them needs fillers.
PROMPTS = ("x" * 60, "abc", "hello", "z")
# So many that about half of the completions end before they are cut.
STOP_TOKENS = list(range(2, 60))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step to take.

    Attributes:
        name: Of its results.
        settings: Of the run, besides the common ones.
        moved: Whether the policy has left its reference when the step begins.
        ends: Whether completions may end before they are cut.
        equal: A prompt, by its place, whose completions all get the same reward; None for none.
        broken: What is done wrong on purpose: `micro_batch_mean`, `rank_mean`, `reward`; None for nothing.
    """

    name: str
    settings: dict[str, Any]
    moved: bool = False
    ends: bool = True
    equal: int | None = None
    broken: str | None = None


def make_model(*, ends: bool = True) -> Any:
    """The policy before anything."""
    model = tiny_model(dtype=torch.float64)
    if ends:
        model.generation_config.eos_token_id = STOP_TOKENS
    return model


def move(model: Any) -> None:
    """Move all weights a little, the same each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.02 * torch.randn(value.shape, generator=generator, dtype=value.dtype)


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Anything that differs between completions."""
    return [sum(ids) / (100.0 * len(ids)) for ids in completion_ids]


def equal_reward(place: int) -> Any:
    """The same reward for all completions of one prompt."""

    def reward_but_one(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [
            0.5 if prompt == PROMPTS[place] else value
            for prompt, value in zip(prompts, reward(completion_ids), strict=True)
        ]

    return reward_but_one


def failing_reward(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
    """Passes the check before training, fails in it."""
    if trainer_state is not None:
        raise ValueError("this reward fails in training")
    return [0.0] * len(completion_ids)


class OneStepTrainer(ReferenceTrainer):
    """Keeps the groups it trained on and counts micro-batches; `broken` spoils the loss."""

    broken: str | None = None

    def score(self, prompts: Any, **keywords: Any) -> tuple[ScoredGroup, ...]:
        groups = super().score(prompts, **keywords)
        self.groups = tuple(replace(group, rollouts=tuple(map(_disagreeing, group.rollouts))) for group in groups)
        return self.groups

    def compute_loss(self, model: Any, inputs: MicroBatch, *args: Any, **keywords: Any) -> torch.Tensor:
        self.micro_batches = [*getattr(self, "micro_batches", []), inputs]
        if self.broken == "micro_batch_mean":
            counts = (inputs.loss_weights != 0).float()
            inputs = replace(inputs, loss_weights=counts / counts.sum().clamp(min=1))
        loss = super().compute_loss(model, inputs, *args, **keywords)
        return loss / self.args.world_size if self.broken == "rank_mean" else loss


class KeepGradients(TrainerCallback):  # type: ignore[misc]
    """Copies the gradients at the last moment before the optimizer uses them."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients = {name: value.grad.clone() for name, value in model.named_parameters()}


def take_step(case: Case, output_dir: Path) -> dict[str, Any]:
    """Take the step and return what happened."""
    model, kept = make_model(ends=case.ends), KeepGradients()
    settings = {
        "output_dir": str(output_dir),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "num_generations": 3,
        "max_completion_length": 6,
        "shuffle_dataset": False,
        "max_steps": 1,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "disable_tqdm": False,
        "per_device_train_batch_size": 12
        // (int(os.environ.get("WORLD_SIZE", "1")) * int(case.settings.get("gradient_accumulation_steps", 1))),
    }
    trainer = OneStepTrainer(
        model=model,
        reward_funcs=failing_reward
        if case.broken == "reward"
        else reward
        if case.equal is None
        else equal_reward(case.equal),
        args=GRPOConfig(**settings | case.settings),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tiny_tokenizer(),
        callbacks=[kept],
        optimizers=(torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), None),
    )
    trainer.broken = case.broken
    if case.moved:
        move(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    try:
        trainer.train()
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        trainer.close()
    return {
        "groups": [_as_plain(group) for group in getattr(trainer, "groups", ())],
        "gradients": kept.gradients,
        "changes": {name: value.detach() - before[name] for name, value in model.named_parameters()},
        "num_micro_batches": len(trainer.micro_batches),
        "num_fillers": sum(not bool(batch.loss_weights.any()) for batch in trainer.micro_batches),
        "log": trainer.state.log_history[0],
    }


def _disagreeing(rollout: Rollout) -> Rollout:
    """The same completion from an engine whose logprobs are a little off; how, follows from the tokens."""
    random = np.random.default_rng(rollout.token_ids.tolist())
    noise = random.normal(0.0, 0.2, len(rollout.token_ids)).astype(np.float32)
    return replace(rollout, rollout_logprobs=rollout.rollout_logprobs + noise)


def _as_plain(group: ScoredGroup) -> dict[str, Any]:
    return {
        "prompt": list(group.prompt.token_ids),
        "completions": [rollout.token_ids.tolist() for rollout in group.rollouts],
        "rollout_logprobs": [torch.from_numpy(rollout.rollout_logprobs).double() for rollout in group.rollouts],
        "was_cut": [rollout.finish_reason == "length" for rollout in group.rollouts],
        "rewards": group.rewards[:, 0].tolist(),
    }


def main() -> None:
    """Take every step of the list."""
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for entry in cases:
        case = Case(**entry)
        result = take_step(case, folder / "runs" / case.name)
        torch.save(result, folder / f"{case.name}.{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main()
