"""Completions in parquet: what a row holds, and that no half file is ever seen."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.observe.completions import CompletionRow, CompletionsWriter, read_completions, rows_of_group
from shoal.types import Prompt, Rollout, ScoredGroup


def make_row(**changes: Any) -> CompletionRow:
    values: dict[str, Any] = {
        "row": 3,
        "prompt": "1+1=",
        "completion": "2",
        "rewards": {"reward": 1.0, "brevity": None},
        "reward": 1.0,
        "advantage": 0.5,
        "num_tokens": 2,
        "finish_reason": "stop",
        "engine": "engine-0",
        "weight_version": 4,
        "seed": 2**62,
        "extras": {"parsed": [2], "nan": float("nan")},
    }
    return CompletionRow(**(values | changes))


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = CompletionsWriter(tmp_path / "completions").write(12, [make_row()])
    assert path.name == "completions_00012.parquet"
    assert read_completions(tmp_path / "completions") == [
        {
            "step": 12,
            "row": 3,
            "prompt": "1+1=",
            "completion": "2",
            "rewards/reward": 1.0,
            "rewards/brevity": None,
            "reward": 1.0,
            "advantage": 0.5,
            "num_tokens": 2,
            "finish_reason": "stop",
            "engine": "engine-0",
            "weight_version": 4,
            "seed": 2**62,
            "extras": '{"parsed": [2], "nan": null}',
        }
    ]


def test_a_column_of_nothing_but_none_keeps_its_type(tmp_path: Path) -> None:
    path = CompletionsWriter(tmp_path).write(1, [make_row(reward=None, advantage=None, seed=None)])
    schema = pq.read_schema(path)
    assert [schema.field(name).type for name in ("reward", "rewards/brevity", "seed")] == [
        pa.float64(),
        pa.float64(),
        pa.int64(),
    ]


def test_conversations_are_json_and_an_assistant_message_is_its_text(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "¿1+1?"}]
    CompletionsWriter(tmp_path).write(
        1, [make_row(prompt=messages, completion=[{"role": "assistant", "content": "2 \ud800"}])]
    )
    (row,) = read_completions(tmp_path)
    assert json.loads(row["prompt"]) == messages
    assert "¿" in row["prompt"]
    assert row["completion"] == "2 ?"


def test_steps_are_read_in_order_and_by_choice(tmp_path: Path) -> None:
    writer = CompletionsWriter(tmp_path)
    for step in (100000, 2, 1):
        writer.write(step, [make_row(num_tokens=step)])
    assert [row["step"] for row in read_completions(tmp_path)] == [1, 2, 100000]
    assert [row["num_tokens"] for row in read_completions(tmp_path, steps=[2, 3])] == [2]


def test_a_step_written_again_replaces_the_first(tmp_path: Path) -> None:
    writer = CompletionsWriter(tmp_path)
    writer.write(1, [make_row(completion="old")])
    writer.write(1, [make_row(completion="new")])
    assert [row["completion"] for row in read_completions(tmp_path)] == ["new"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CompletionsWriter(tmp_path)
    writer.write(1, [make_row(completion="old")])

    def full_disk(table: pa.Table, path: Path, **kwargs: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(OSError, match="No space"):
        writer.write(1, [make_row(completion="new")])
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["completions_00001.parquet"]
    assert [row["completion"] for row in read_completions(tmp_path)] == ["old"]


def test_a_missing_folder_has_no_completions(tmp_path: Path) -> None:
    assert read_completions(tmp_path / "none") == []


def test_a_scored_group_becomes_one_row_per_completion() -> None:
    rollouts = tuple(
        Rollout(
            token_ids=np.zeros(length, dtype=np.int32),
            rollout_logprobs=np.zeros(length, dtype=np.float32),
            finish_reason="length",
            weight_version=2,
            engine=f"engine-{length}",
        )
        for length in (1, 5)
    )
    group = ScoredGroup(
        prompt=Prompt(row=8, prompt="p", token_ids=(1,), columns={}),
        rollouts=rollouts,
        completions=("a", "b"),
        rewards=np.array([[1.0, np.nan], [0.0, np.nan]]),
        extras={"note": ("x", "y")},
    )
    rows = rows_of_group(
        group,
        reward_names=("right", "brief"),
        rewards=np.array([1.0, np.nan]),
        advantages=np.array([0.7, np.nan]),
        seeds=(11, 12),
    )
    assert rows[0].rewards == {"right": 1.0, "brief": None}
    assert [(row.row, row.completion, row.num_tokens, row.engine, row.seed) for row in rows] == [
        (8, "a", 1, "engine-1", 11),
        (8, "b", 5, "engine-5", 12),
    ]
    assert [(row.reward, row.advantage, row.extras) for row in rows] == [
        (1.0, 0.7, {"note": "x"}),
        (None, None, {"note": "y"}),
    ]
