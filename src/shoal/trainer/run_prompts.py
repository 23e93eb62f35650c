"""A run's prompts: which ones each batch of training takes, and which ones an evaluation."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from shoal.config import GRPOConfig
from shoal.data.prompts import PromptSource
from shoal.data.schedule import PromptSchedule
from shoal.errors import ConfigError
from shoal.types import Prompt


class RunPrompts:
    """The prompts of the training's dataset and of the evaluation's.

    Args:
        train_dataset: What to train on.
        eval_dataset: What `evaluation` is of unless it is told otherwise; None if it will be.
        tokenizer: The policy's.
        args: The settings.
        max_prompt_tokens: Most tokens that a prompt may have.

    Raises:
        ConfigError: A dataset is a stream, or too small for a batch.
        DatasetError: A dataset is not one of prompts, or a prompt is too long.
    """

    def __init__(
        self,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        tokenizer: Any,
        args: GRPOConfig,
        *,
        max_prompt_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._args = args
        self._train = self._source(train_dataset, max_prompt_tokens)
        self._eval = self._source(eval_dataset, max_prompt_tokens) if eval_dataset is not None else None
        self._schedule = PromptSchedule(
            num_prompts=len(self._train),
            prompts_per_batch=args.prompts_per_batch,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.shuffle_dataset,
        )

    @property
    def first(self) -> Prompt:
        """The training dataset's first row."""
        return self._train.get(0)

    @property
    def batches_per_epoch(self) -> int:
        """Number of whole batches in an epoch, at least 1."""
        return self._schedule.batches_per_epoch

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens of the longest prompt with a whole completion."""
        return self._longest + self._args.max_completion_length

    def batch(self, number: int) -> list[Prompt]:
        """Return the prompts of a training batch, counted from 0."""
        return [self._train.get(row) for row in self._schedule.rows(number)]

    def evaluation(self, dataset: Dataset | None) -> PromptSource:
        """Return the prompts of an evaluation.

        Args:
            dataset: Another one than the run's, with no longer prompts: that is what engines are started for. None for
                the run's.

        Raises:
            ConfigError: There is none, neither here nor of the run.
            DatasetError: It is not one of prompts, or a prompt is too long.
        """
        source = self._eval if dataset is None else self._source(dataset, self._longest)
        if source is None:
            raise ConfigError("evaluate() needs an eval_dataset. Pass one, here or to GRPOTrainer.")
        return source

    @property
    def _longest(self) -> int:
        return max(source.longest for source in (self._train, self._eval) if source is not None)

    def _source(self, dataset: Dataset, max_prompt_tokens: int) -> PromptSource:
        return PromptSource(
            dataset,
            self._tokenizer,
            max_prompt_tokens=max_prompt_tokens,
            chat_template_kwargs=self._args.chat_template_kwargs,  # type: ignore[arg-type]
        )
