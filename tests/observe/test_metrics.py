"""metrics.jsonl, as written and as read back after all kinds of ends."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.observe.files import JSONValue
from shoal.observe.metrics import MetricsWriter, merge_by_step, read_metrics


def test_each_line_is_an_object_with_step_time_and_values(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run" / "metrics.jsonl", clock=lambda: 12.34567)
    writer.write(1, {"reward": 0.5, "loss": np.float32(0.25), "kl": torch.tensor(2.0), "note": "a\u2028b"})
    # Read before it is closed: what was written must be there although the process may die now.
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [
        {"step": 1, "time": 12.346, "reward": 0.5, "loss": 0.25, "kl": 2.0, "note": "a\u2028b"}
    ]
    writer.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float64("nan"), torch.tensor(float("-inf"))])
def test_what_is_not_finite_becomes_null(tmp_path: Path, value: object) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path).write(1, {"reward": value})
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["reward"] is None


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew')
    assert read_metrics(path) == [{"step": 1}]


def test_writing_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew')
    MetricsWriter(path).write(2, {"reward": 1.0})
    assert [(row["step"], row.get("reward")) for row in read_metrics(path)] == [(1, None), (2, 1.0)]


def test_writing_goes_on_after_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsWriter(path).write(2, {})
    assert path.read_text().count("\n") == 2


def test_a_resumed_runs_later_values_win() -> None:
    rows: list[dict[str, JSONValue]] = [
        {"step": 1, "a": 1},
        {"step": 2, "a": 2, "b": 2},
        {"step": 2, "a": 3},
        {"step": 3},
        {"note": "no step"},
    ]
    assert merge_by_step(rows) == [{"step": 1, "a": 1}, {"step": 2, "a": 3, "b": 2}, {"step": 3}]
