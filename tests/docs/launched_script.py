"""A user's script for `accelerate launch`, with the exact engine in place of vLLM's: three steps, a model saved whole.

    accelerate launch --config_file examples/accelerate/zero3.yaml launched_script.py MODEL FOLDER [unmet]

Processes on CPUs have to meet before accelerate looks for them: `unmet` leaves that out.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM

from shoal import GRPOConfig
from shoal.testing import tiny_tokenizer
from shoal.testing.trainer import ReferenceTrainer, reference_rollouts
from shoal.trainer.rollouts import Rollouts

COMPLETIONS = 12
PROMPTS = ("x" * 60, "abc", "hello", "z")


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Anything that differs between completions."""
    return [sum(ids) / (100.0 * len(ids)) for ids in completion_ids]


def main() -> None:
    """Train, and have rank 0 write the losses."""
    model, folder = sys.argv[1], Path(sys.argv[2])
    writer = AutoModelForCausalLM.from_pretrained(model, dtype="float32")  # before settings that may have it divided

    class Trainer(ReferenceTrainer):
        """Has its completions written by the model as it was at first: a divided one cannot be asked by one rank."""

        def _start_rollouts(self) -> Rollouts:
            return reference_rollouts(self, writer)

    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    meets = num_processes > 1 and "unmet" not in sys.argv
    if meets:
        PartialState(backend="gloo")
    trainer = Trainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(folder),
            accelerator_config={"use_configured_state": meets},
            report_to="none",
            bf16=False,
            beta=0.1,
            num_generations=3,
            per_device_train_batch_size=COMPLETIONS // 2 // num_processes,
            gradient_accumulation_steps=2,
            max_completion_length=6,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            learning_rate=1e-3,
            lr_scheduler_type="constant",
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    trainer.save_model(str(folder / "final"))
    if trainer.is_world_process_zero():
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
