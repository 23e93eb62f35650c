"""A run that notes which prompts each step sees, and that can be told to die.

python resume_script.py FOLDER MAX_STEPS DIES_AT
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from shoal import GRPOConfig
from shoal.testing import tiny_model, tiny_tokenizer
from shoal.testing.trainer import ReferenceTrainer

NUM_PROMPTS = 11
STEPS_PER_EPOCH = 5  # Two prompts a step; the eleventh is left out.


class Dies(TrainerCallback):  # type: ignore[misc]
    """Kills its own process at the end of a step, before anything of that step is saved."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def make_run(folder: Path, *, max_steps: int, dies_at: int | None = None, **changes: Any) -> Any:
    """Make a trainer that appends what its rewards see to `seen.jsonl`."""

    def reward(prompts: list[str], completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        if trainer_state is not None:  # None in the check before training
            with (folder / "seen.jsonl").open("a") as file:
                file.write(json.dumps([trainer_state.global_step, prompts[0], completion_ids]) + "\n")
        return [sum(ids) / len(ids) / 300 for ids in completion_ids]

    settings = {
        "output_dir": str(folder / "run"),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_generations": 2,
        "max_completion_length": 4,
        "learning_rate": 1e-2,
        "max_steps": max_steps,
        "logging_steps": 1,
        "save_steps": 1,
        "disable_tqdm": False,
    }
    return ReferenceTrainer(
        model=tiny_model(),
        reward_funcs=reward,
        args=GRPOConfig(**settings | changes),
        train_dataset=Dataset.from_list([{"prompt": f"prompt {index}"} for index in range(NUM_PROMPTS)]),
        processing_class=tiny_tokenizer(),
        callbacks=[] if dies_at is None else [Dies(dies_at)],
    )


def seen(folder: Path) -> list[list[Any]]:
    """What the rewards saw, in the order in which they saw it."""
    return [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_run(Path(sys.argv[1]), max_steps=int(sys.argv[2]), dies_at=int(sys.argv[3])).train()
