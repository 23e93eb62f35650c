"""What a run leaves behind as it goes: `metrics.jsonl`, every completion as parquet, some of them on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config import GRPOConfig
from shoal.observe.completions import CompletionRow, CompletionsWriter, rows_of_group
from shoal.observe.metrics import MetricsWriter
from shoal.observe.sample_table import print_completions
from shoal.trainer.groups import JudgedStep


class RunRecord:
    """Writes into a run's `output_dir`, which is made with the first thing written. For rank 0."""

    def __init__(self, args: GRPOConfig) -> None:
        self._args = args
        self._folder = Path(args.output_dir)
        self._metrics: MetricsWriter | None = None
        self._last_rows: Sequence[CompletionRow] = ()

    def write_completions(self, step: int, judged: JudgedStep, reward_names: Sequence[str]) -> None:
        """Write a step's completions, if `log_completions` is on."""
        if not self._args.log_completions:
            return
        self._last_rows = [
            row
            for index, group in enumerate(judged.groups)
            for row in rows_of_group(
                group,
                reward_names=reward_names,
                rewards=judged.advantages.rewards[index],
                advantages=np.where(group.dropped, np.nan, judged.advantages.advantages[index]),
            )
        ]
        CompletionsWriter(self._folder / "completions").write(step, self._last_rows)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a line of metrics."""
        if self._metrics is None:
            self._metrics = MetricsWriter(self._folder / "metrics.jsonl")
        self._metrics.write(step, metrics)

    def print_completions(self, step: int) -> None:
        """Print completions of the last step, as many as `num_completions_to_print` says, once."""
        print_completions(self._last_rows, step=step, limit=self._args.num_completions_to_print)
        self._last_rows = ()
