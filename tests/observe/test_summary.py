"""summary.json and the versions in it."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.observe.summary import RunSummary, read_summary, versions, write_summary


def make_summary(**changes: Any) -> RunSummary:
    values: dict[str, Any] = {
        "reward_before": 0.25,
        "reward_after": 0.5,
        "reward_ci95": 0.125,
        "num_engines": 2,
        "num_steps": 30,
        "num_publishes": 31,
        "num_publishes_proven": 31,
        "seconds": {"generate": 1.5},
        "versions": {"python": "3.11"},
        "settings": {"learning_rate": 1e-5, "output_dir": Path("runs/demo")},
    }
    return RunSummary(**(values | changes))


def test_the_file_has_every_key_as_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "run" / "summary.json"
    write_summary(path, make_summary(reward_ci95=float("nan")))
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "reward_before": 0.25,
        "reward_after": 0.5,
        "reward_ci95": None,
        "num_engines": 2,
        "num_steps": 30,
        "num_publishes": 31,
        "num_publishes_proven": 31,
        "seconds": {"generate": 1.5},
        "versions": {"python": "3.11"},
        "settings": {"learning_rate": 1e-5, "output_dir": "runs/demo"},
    }


def test_secrets_are_left_out_and_what_only_sounds_like_one_is_kept(tmp_path: Path) -> None:
    secrets = {"hub_token": "hf_x", "vllm_api_key": "k", "token": "t", "push_to_hub_token": None}
    write_summary(tmp_path / "s.json", make_summary(settings={**secrets, "max_tokens": 9, "token_budget": 8}))
    assert read_summary(tmp_path / "s.json")["settings"] == {
        "hub_token": "<HUB_TOKEN>",
        "vllm_api_key": "<VLLM_API_KEY>",
        "token": "<TOKEN>",
        "push_to_hub_token": None,
        "max_tokens": 9,
        "token_budget": 8,
    }


def test_a_summary_that_is_missing_or_broken_reads_as_empty(tmp_path: Path) -> None:
    assert read_summary(tmp_path / "none.json") == {}
    (tmp_path / "torn.json").write_text('{"num_steps": 3')
    assert read_summary(tmp_path / "torn.json") == {}


def test_versions_are_those_that_run() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    # A registry's build may say "+cu130" in one place and not in the other.
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found) <= {"python", "shoal", "torch", "transformers", "accelerate", "vllm", "peft"}
