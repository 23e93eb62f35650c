"""Which prompts a batch takes and an evaluation, and how long they may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from shoal import GRPOConfig
from shoal.errors import ConfigError, DatasetError
from shoal.testing import tiny_tokenizer
from shoal.trainer.run_prompts import RunPrompts


def make(tmp_path: Path, train: list[str], evaluated: list[str] | None = None, **changes: Any) -> RunPrompts:
    """Prompts of text, of which the tokenizer makes a token of each byte; two in each batch."""
    values: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
    }
    return RunPrompts(
        Dataset.from_dict({"prompt": train}),
        None if evaluated is None else Dataset.from_dict({"prompt": evaluated}),
        tiny_tokenizer(),
        GRPOConfig(**values | changes),
        max_prompt_tokens=10,
    )


def texts(prompts: Any) -> list[Any]:
    return [prompt.prompt for prompt in prompts]


def test_batches_go_through_the_dataset_epoch_after_epoch(tmp_path: Path) -> None:
    prompts = make(tmp_path, ["a", "b", "c", "d"], shuffle_dataset=False)
    assert prompts.batches_per_epoch == 2 and prompts.first.prompt == "a"
    assert [texts(prompts.batch(number)) for number in range(3)] == [["a", "b"], ["c", "d"], ["a", "b"]]


@pytest.mark.parametrize(("changes", "is_same"), [({"seed": 7}, True), ({"data_seed": 8}, False)])
def test_the_order_is_drawn_from_the_seed_unless_the_data_has_its_own(
    tmp_path: Path, changes: dict[str, int], is_same: bool
) -> None:
    letters = list("abcdefghijklmnop")
    order, other = make(tmp_path, letters, seed=7), make(tmp_path, letters, **{"seed": 7} | changes)
    assert ([texts(order.batch(i)) for i in range(8)] == [texts(other.batch(i)) for i in range(8)]) == is_same


def test_the_longest_sequence_is_of_either_dataset_with_a_whole_completion(tmp_path: Path) -> None:
    assert make(tmp_path, ["a", "bbb"]).max_sequence_tokens == 3 + 5
    assert make(tmp_path, ["a", "bbb"], ["cccc"]).max_sequence_tokens == 4 + 5
    assert make(tmp_path, ["a", "bbb"], ["cc"]).max_sequence_tokens == 3 + 5


def test_an_evaluation_is_of_the_runs_dataset_or_of_another_with_no_longer_prompts(tmp_path: Path) -> None:
    prompts = make(tmp_path, ["a", "bbb"], ["cc"])
    own = prompts.evaluation(None)
    other = prompts.evaluation(Dataset.from_dict({"prompt": ["ddd"]}))
    assert [own.get(0).prompt, other.get(0).prompt] == ["cc", "ddd"]
    with pytest.raises(DatasetError, match="prompt of row 0 has 4 tokens"):
        prompts.evaluation(Dataset.from_dict({"prompt": ["eeee"]}))


def test_an_evaluation_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs an eval_dataset"):
        make(tmp_path, ["a", "b"]).evaluation(None)


@pytest.mark.parametrize("evaluated", [None, ["a" * 11]])
def test_prompts_of_both_datasets_must_fit_the_context(tmp_path: Path, evaluated: list[str] | None) -> None:
    train = ["a", "b"] if evaluated else ["a", "b" * 11]
    with pytest.raises(DatasetError, match="has 11 tokens"):
        make(tmp_path, train, evaluated)
    assert make(tmp_path, ["a", "b" * 10], evaluated and ["a" * 10]).max_sequence_tokens == 15  # the control
