"""Read prompts from a dataset, checked and tokenised once at the start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from shoal.errors import ConfigError, DatasetError
from shoal.types import Prompt, PromptLike

RESERVED_COLUMNS = ("prompt", "completion", "completion_ids")
"""Columns that reward functions do not get from the dataset, since rollouts provide these names; TRL's list."""

_BATCH_ROWS = 256


class PromptSource:
    """The prompts of a dataset, by row.

    All rows are tokenised at construction, so that a bad one is found before a GPU is used; of that, only token ids
    are kept.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        tokenizer: Any,
        *,
        max_prompt_tokens: int,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Check and tokenise all prompts, as TRL does: text as it is, conversations through the chat template.

        Args:
            dataset: Rows with a `prompt`: all text, or all conversations (lists of messages).
            tokenizer: A tokenizer of transformers, with a chat template if prompts are conversations.
            max_prompt_tokens: Most tokens that a prompt may have.
            chat_template_kwargs: What the chat template gets besides the messages.

        Raises:
            ConfigError: The dataset is a stream, or a dictionary of splits.
            DatasetError: The dataset is empty or without prompts, or a prompt is of the wrong kind, empty or too long.
        """
        _check_dataset(dataset)
        self._dataset = dataset
        self._ids, self._offsets = _tokenize_all(dataset, tokenizer, dict(chat_template_kwargs or {}))
        _check_lengths(np.diff(self._offsets), max_prompt_tokens)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self._offsets) - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(np.diff(self._offsets).max())

    def get(self, row: int) -> Prompt:
        """Give one row as a prompt; negative rows do not count from the end.

        Raises:
            IndexError: There is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in the dataset, which has rows 0 to {len(self) - 1}")
        example = self._dataset[row]
        return Prompt(
            row=row,
            prompt=example["prompt"],
            token_ids=tuple(self._ids[self._offsets[row] : self._offsets[row + 1]].tolist()),
            columns={name: value for name, value in example.items() if name not in RESERVED_COLUMNS},
        )


def _check_dataset(dataset: Any) -> None:
    """Raise unless this is one map-style dataset with rows and a `prompt` column."""
    if isinstance(dataset, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise ConfigError(
            f"The dataset is a stream ({type(dataset).__name__}), whose rows have no number, so a resumed run could "
            "not find its place. Load it without streaming=True, or materialise as much of it as you need: "
            "datasets.Dataset.from_list(list(stream.take(10_000)))."
        )
    if isinstance(dataset, datasets.DatasetDict):
        raise ConfigError(
            f"The dataset is a dictionary of splits ({', '.join(map(str, dataset))}), not one dataset. "
            'Choose one, such as dataset["train"].'
        )
    if not isinstance(dataset, datasets.Dataset):
        raise ConfigError(
            f"The dataset is a {type(dataset).__name__}, not a datasets.Dataset. "
            "Make it one, for instance with datasets.Dataset.from_list(rows)."
        )
    if "prompt" not in dataset.column_names:
        seen = ", ".join(dataset.column_names) or "none"
        raise DatasetError(
            f'The dataset has no column "prompt" (its columns: {seen}), so there is nothing to complete. '
            'Rename the column that holds the prompts: dataset.rename_column(old_name, "prompt").'
        )
    if len(dataset) == 0:
        raise DatasetError("The dataset has no rows, so there is nothing to train on. Check the split and any filter.")


def _tokenize_all(
    dataset: datasets.Dataset, tokenizer: Any, chat_template_kwargs: dict[str, Any]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Tokenise every prompt into one flat array and the offsets of the rows in it.

    Python integers in tuples would take some ten times the memory, for a column that is alive during the whole run.
    """
    flat: list[npt.NDArray[np.int32]] = []
    lengths: list[int] = []
    conversational: bool | None = None
    for start, prompts in _batches(dataset):
        for row, prompt in enumerate(prompts, start):
            kind = _is_conversation(prompt, row)
            if conversational is not None and kind != conversational:
                raise DatasetError(
                    f"Row {row} has a prompt of type {type(prompt).__name__}, unlike the rows before it. Reward "
                    "functions get all completions as text or all as messages. Make all prompts one or the other."
                )
            conversational = kind
        for ids in _tokenize(prompts, bool(conversational), tokenizer, chat_template_kwargs):
            flat.append(np.asarray(ids, dtype=np.int32))
            lengths.append(len(ids))
    return np.concatenate(flat), np.cumsum([0, *lengths], dtype=np.int64)


def _batches(dataset: datasets.Dataset) -> Iterator[tuple[int, list[Any]]]:
    """Yield the prompt column in batches, with the row of the first."""
    batches = dataset.select_columns(["prompt"]).iter(batch_size=_BATCH_ROWS)
    for number, batch in enumerate(batches):
        yield number * _BATCH_ROWS, list(batch["prompt"])


def _is_conversation(prompt: Any, row: int) -> bool:
    """Tell a conversation from text, and raise for anything else."""
    if isinstance(prompt, str):
        return False
    if isinstance(prompt, list) and prompt and all(isinstance(m, dict) and m.get("role") is not None for m in prompt):
        return True
    raise DatasetError(
        f"Row {row} has the prompt {_shortened(prompt)} of type {type(prompt).__name__}, which is neither text nor a "
        'conversation. Make it a string, or a non-empty list of messages such as [{"role": "user", "content": "..."}].'
    )


def _tokenize(
    prompts: list[PromptLike], conversational: bool, tokenizer: Any, chat_template_kwargs: dict[str, Any]
) -> list[list[int]]:
    """Tokenise a batch without padding."""
    if not conversational:
        encoded = tokenizer(text=prompts)
    else:
        encoded = tokenizer.apply_chat_template(
            conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **chat_template_kwargs
        )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _check_lengths(lengths: npt.NDArray[np.int64], max_prompt_tokens: int) -> None:
    """Raise for prompts without tokens or with too many, naming the first and how many there are."""
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        raise DatasetError(
            f"The prompt of row {empty[0]} has no tokens ({len(empty)} of {len(lengths)} rows), so nothing predicts "
            "the first token of its completion. Remove such rows with dataset.filter, or give them a prompt."
        )
    too_long = np.flatnonzero(lengths > max_prompt_tokens)
    if len(too_long):
        raise DatasetError(
            f"The prompt of row {too_long[0]} has {lengths[too_long[0]]} tokens, more than the {max_prompt_tokens} "
            f"that fit beside max_completion_length ({len(too_long)} of {len(lengths)} rows are too long, the longest "
            f"has {lengths.max()}). Remove such rows with dataset.filter, shorten them, or leave more room for prompts."
        )


def _shortened(value: object) -> str:
    """Show the start of a value of any size."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
