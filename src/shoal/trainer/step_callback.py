"""Do what a step needs between transformers' calls of the trainer, through its callbacks."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from shoal.trainer.grpo_trainer import GRPOTrainer


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Publishes after each optimizer step, before anything is logged, saved or evaluated.

    Args:
        trainer: Which holds it in turn.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = weakref.proxy(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with no completions, and with engines that hold nothing."""
        self._trainer.begin_training()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the weights alone if nothing of the step is in the loss."""
        self._trainer.skip_empty_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Publish what the optimizer has made."""
        self._trainer.publish_after_step()
