"""Write and read the completions of each step as parquet, one file a step."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shoal.observe.files import encodable, replace_file, to_json
from shoal.types import CompletionLike, FinishReason, PromptLike, ScoredGroup

_FILE_NAME = re.compile(r"completions_(\d+)\.parquet")
REWARD_PREFIX = "rewards/"
"""Precedes a reward function's name in its column, as in the names of metrics: a function may be called `reward`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRow:
    """One completion, as it is written down.

    Attributes:
        row: Index of the prompt's row in the dataset.
        prompt: What the model was asked.
        completion: What it wrote, as the reward functions saw it.
        rewards: Reward by function name; None where the function did not apply.
        reward: The weighted sum of them; None when no function applied.
        advantage: None when the completion is not trained on.
        num_tokens: Number of completion tokens.
        finish_reason: Whether it ended by itself or was cut.
        engine: Name of the engine that wrote it.
        weight_version: Version of the weights that wrote it.
        seed: The sample's own seed, if known.
        extras: What reward functions logged about it with `log_extra`.
    """

    row: int
    prompt: PromptLike
    completion: CompletionLike
    rewards: Mapping[str, float | None]
    reward: float | None
    advantage: float | None
    num_tokens: int
    finish_reason: FinishReason
    engine: str
    weight_version: int
    seed: int | None
    extras: Mapping[str, Any]


def rows_of_group(
    group: ScoredGroup,
    *,
    reward_names: Sequence[str],
    rewards: npt.NDArray[np.float64],
    advantages: npt.NDArray[np.float64],
    seeds: Sequence[int] | None = None,
) -> tuple[CompletionRow, ...]:
    """Return a scored group as rows.

    Args:
        group: The K completions with their rewards by function.
        reward_names: Names of the F reward functions, in the order of the columns of `group.rewards`.
        rewards: `[K]`, the weighted sums; NaN where no function applied.
        advantages: `[K]`; NaN where the completion is not trained on.
        seeds: The K seeds, if known.
    """
    return tuple(
        CompletionRow(
            row=group.prompt.row,
            prompt=group.prompt.prompt,
            completion=group.completions[index],
            rewards={
                name: _none_for_nan(value) for name, value in zip(reward_names, group.rewards[index], strict=True)
            },
            reward=_none_for_nan(rewards[index]),
            advantage=_none_for_nan(advantages[index]),
            num_tokens=len(rollout.token_ids),
            finish_reason=rollout.finish_reason,
            engine=rollout.engine,
            weight_version=rollout.weight_version,
            seed=None if seeds is None else seeds[index],
            extras={column: values[index] for column, values in group.extras.items()},
        )
        for index, rollout in enumerate(group.rollouts)
    )


class CompletionsWriter:
    """Writes one parquet file for each step into a folder."""

    def __init__(self, folder: str | Path) -> None:
        """Make the folder.

        Raises:
            OSError: The folder cannot be made.
        """
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, rows: Sequence[CompletionRow]) -> Path:
        """Write the completions of a step; a step that is written again, after a resume, replaces the first.

        Returns:
            The file.

        Raises:
            OSError: The disk is full, or the folder cannot be written to. No half file is left.
        """
        path = self._folder / f"completions_{step:05d}.parquet"
        table = _table(step, rows)
        replace_file(path, lambda part: pq.write_table(table, part, compression="zstd"))
        return path


def completion_files(folder: str | Path) -> dict[int, Path]:
    """Return the files of a folder by step, in order of steps; empty when there is no such folder."""
    found = {}
    for path in Path(folder).glob("completions_*.parquet"):
        match = _FILE_NAME.fullmatch(path.name)
        if match:
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def read_completions(folder: str | Path, *, steps: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Read completions back, one dict per completion with the file's columns, in order of steps.

    Args:
        folder: Where `CompletionsWriter` wrote.
        steps: Which steps to read; all by default. Steps without a file are left out.
    """
    rows: list[dict[str, Any]] = []
    for step, path in completion_files(folder).items():
        if steps is None or step in steps:
            rows.extend(pq.read_table(path).to_pylist())
    return rows


def _table(step: int, rows: Sequence[CompletionRow]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row.rewards))
    columns: dict[str, tuple[pa.DataType, list[Any]]] = {
        "step": (pa.int64(), [step] * len(rows)),
        "row": (pa.int64(), [row.row for row in rows]),
        "prompt": (pa.string(), [_as_text(row.prompt) for row in rows]),
        "completion": (pa.string(), [_as_text(row.completion) for row in rows]),
        **{REWARD_PREFIX + name: (pa.float64(), [row.rewards.get(name) for row in rows]) for name in names},
        "reward": (pa.float64(), [row.reward for row in rows]),
        "advantage": (pa.float64(), [row.advantage for row in rows]),
        "num_tokens": (pa.int64(), [row.num_tokens for row in rows]),
        "finish_reason": (pa.string(), [row.finish_reason for row in rows]),
        "engine": (pa.string(), [row.engine for row in rows]),
        "weight_version": (pa.int64(), [row.weight_version for row in rows]),
        "seed": (pa.int64(), [row.seed for row in rows]),
        "extras": (pa.string(), [to_json(row.extras) for row in rows]),
    }
    # Types are given, not inferred: a column of nothing but None would have another type than the next step's.
    return pa.table({name: pa.array(values, type=kind) for name, (kind, values) in columns.items()})


def _as_text(value: PromptLike | CompletionLike) -> str:
    """Return text as it is, one assistant message as its text, and any other conversation as JSON."""
    if isinstance(value, str):
        return encodable(value)
    if len(value) == 1 and value[0].keys() == {"role", "content"} and value[0]["role"] == "assistant":
        content = value[0]["content"]
        if isinstance(content, str):
            return encodable(content)
    return to_json(value)


def _none_for_nan(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
