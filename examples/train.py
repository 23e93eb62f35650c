"""Train a model to add one-digit numbers: `python examples/train.py path-or-id`, or with `accelerate launch`."""

import sys

from datasets import Dataset

from shoal import GRPOConfig, GRPOTrainer


def reward(completions, answer, **kwargs):
    """Give 1 to a completion that begins with the right number."""
    return [1.0 if text.strip().startswith(right) else 0.0 for text, right in zip(completions, answer, strict=True)]


def main() -> None:
    """Train on all sums of two digits."""
    rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(10) for b in range(10)]
    trainer = GRPOTrainer(
        model=sys.argv[1],
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir="runs/sums",
            num_generations=8,
            per_device_train_batch_size=64,
            max_completion_length=8,
            learning_rate=1e-5,
            max_steps=20,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    trainer.save_model("runs/sums/model")


if __name__ == "__main__":
    main()
