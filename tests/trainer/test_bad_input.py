"""Bad input is refused with a clear error before any engine is started, and nothing is left behind."""

from __future__ import annotations

import math
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from datasets import Dataset

from shoal import GRPOConfig, GRPOTrainer
from shoal.errors import ConfigError, DatasetError, RewardError, ShoalError
from shoal.testing import tiny_model, tiny_tokenizer
from shoal.trainer import grpo_trainer
from shoal.trainer.checks import check_disk, check_reward_weights, longest_prompt

MIB = 1 << 20


class EngineStart(Exception):
    """Stands for what starting an engine would be."""


def raises(completions: list[str], **_: Any) -> list[float]:
    raise KeyError("answer")


def wrong_count(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * (len(completions) + 1)


def not_a_number(completions: list[str], **_: Any) -> list[float]:
    return [math.nan] * len(completions)


def no_list(completions: list[str], **_: Any) -> float:
    return 1.0


@pytest.fixture
def engine_starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes every attempt to start engines, and refuses it."""
    starts: list[str] = []

    def start(*_: Any, **__: Any) -> None:
        starts.append("start")
        raise EngineStart

    monkeypatch.setattr(grpo_trainer, "start_rollouts", start)
    return starts


@pytest.fixture
def nothing_left(settings: dict[str, Any], engine_starts: list[str]) -> Iterator[None]:
    """Fails a test after which an engine, a process or a file of an engine is left."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    assert engine_starts == []
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert not (Path(settings["output_dir"]) / "engines").exists()


def table(**columns: Any) -> Dataset:
    return Dataset.from_dict(columns)


BAD: dict[str, tuple[dict[str, Any], type[ShoalError], str]] = {
    "an empty dataset": ({"train_dataset": table(prompt=[])}, DatasetError, "has no rows"),
    "no prompt column": (
        {"train_dataset": table(question=["1+1"] * 8)},
        DatasetError,
        r'no column "prompt" \(its columns: question\)',
    ),
    "a prompt longer than the context": (
        {"prompts": ["a"] * 7 + ["b" * 300]},
        DatasetError,
        r"prompt of row 7 has 300 tokens, more than the 252 that fit",
    ),
    "a prompt that leaves no room for a completion": (
        {"prompts": ["a"] * 7 + ["b" * 60], "vllm_max_model_length": 63},
        DatasetError,
        r"prompt of row 7 has 60 tokens, more than the 59 that fit",
    ),
    "an empty prompt": ({"prompts": ["a", ""] * 4}, DatasetError, "prompt of row 1 has no tokens"),
    "fewer prompts than a step takes": ({"prompts": "a"}, ConfigError, "the dataset has only 1"),
    "completions longer than the context": (
        {"max_completion_length": 256},
        ConfigError,
        "leaves no room for a prompt in a context of 256",
    ),
    "a reward that raises": ({"rewards": raises}, RewardError, r"'raises' \(dataset row 0.*raised KeyError: 'answer'"),
    "a reward of the wrong count": ({"rewards": wrong_count}, RewardError, "returned 5 rewards for 4 completions"),
    "a reward that is not a number": ({"rewards": not_a_number}, RewardError, "returned nan for sample 0"),
    "a reward that is not a list": ({"rewards": no_list}, RewardError, "not a list"),
    "no reward": ({"rewards": []}, ConfigError, "reward_funcs is empty"),
    "reward weights of the wrong length": (
        {"reward_weights": [1.0, 2.0]},
        ConfigError,
        "reward_weights has 2 entries for 1 reward functions",
    ),
    "groups of one": ({"num_generations": 1}, ConfigError, "num_generations=1 leaves nothing to compare"),
    "groups that do not fill a step": ({"num_generations": 3}, ConfigError, "num_generations=3 does not divide"),
    "arguments to load a model that is loaded": (
        {"model_init_kwargs": {"dtype": "bfloat16"}},
        ConfigError,
        "model_init_kwargs is set, but the model was given as an object",
    ),
}


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_by_the_constructor(make_trainer: Callable[..., Any], what: str) -> None:
    given, error, message = BAD[what]
    with pytest.raises(error, match=message) as caught:
        make_trainer(kind=GRPOTrainer, **given)
    assert isinstance(caught.value, ShoalError)


def test_good_input_comes_as_far_as_starting_engines(
    make_trainer: Callable[..., Any], engine_starts: list[str]
) -> None:
    trainer = make_trainer(kind=GRPOTrainer)
    assert engine_starts == [] and trainer.rollouts is None
    with pytest.raises(EngineStart):
        trainer.train()
    assert engine_starts == ["start"] and trainer.rollouts is None


@pytest.mark.usefixtures("nothing_left")
def test_a_missing_dataset_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="train_dataset is missing"):
        GRPOTrainer(tiny_model(), raises, GRPOConfig(**settings), processing_class=tiny_tokenizer())


@pytest.mark.usefixtures("nothing_left")
def test_evaluating_without_a_dataset_is_refused(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="needs an eval_dataset"):
        make_trainer(kind=GRPOTrainer).evaluate()


@pytest.mark.usefixtures("nothing_left")
def test_the_prompts_of_an_evaluation_are_checked_like_those_of_the_training(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(DatasetError, match="prompt of row 1 has 300 tokens"):
        make_trainer(kind=GRPOTrainer, eval_dataset=table(prompt=["a", "b" * 300]))


def test_without_the_check_a_failing_reward_ends_the_training_at_its_first_group(
    make_trainer: Callable[..., Any],
) -> None:
    trainer = make_trainer(rewards=raises, reward_preflight=False)
    with pytest.raises(RewardError, match="raised KeyError"):
        trainer.train()
    assert trainer.state.global_step == 0 and trainer.rollouts is None


# ---- a port in use ----


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.usefixtures("nothing_left")
def test_a_port_in_use_is_refused_before_any_process_is_started(
    make_trainer: Callable[..., Any], busy_port: int
) -> None:
    trainer = make_trainer(kind=GRPOTrainer, vllm_base_port=busy_port, vllm_num_engines=1)
    with pytest.raises(ConfigError, match=f"vllm_base_port={busy_port} needs ports .* but {busy_port} is in use"):
        trainer.train()
    assert trainer.state.global_step == 0 and trainer.rollouts is None


def test_a_free_port_is_taken(make_trainer: Callable[..., Any], engine_starts: list[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free_port = listener.getsockname()[1]
    trainer = make_trainer(kind=GRPOTrainer, vllm_base_port=free_port, vllm_num_engines=1)
    with pytest.raises(EngineStart):
        trainer.train()
    assert engine_starts == ["start"]


# ---- a full disk ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount real file systems of a given size."""
    mounted: list[Path] = []

    def mount(num_bytes: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except FileNotFoundError:
            pytest.skip("there is no `mount` here, and a full disk is made by mounting a small one")
        if done.returncode:
            pytest.skip(
                f"a full disk is made by mounting a small one, which is not allowed here: {done.stderr.strip()}"
            )
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True, timeout=10)


@pytest.mark.usefixtures("nothing_left")
def test_a_disk_without_room_for_a_checkpoint_is_refused(
    make_trainer: Callable[..., Any], small_disk: Callable[[int], Path]
) -> None:
    folder = small_disk(MIB)
    with pytest.raises(ConfigError, match=r"has 0\.00 GiB free, but the first checkpoint needs 0\.06 GiB"):
        make_trainer(kind=GRPOTrainer, output_dir=str(folder / "run"))


def test_a_disk_with_room_is_accepted(make_trainer: Callable[..., Any], small_disk: Callable[[int], Path]) -> None:
    assert make_trainer(kind=GRPOTrainer, output_dir=str(small_disk(80 * MIB) / "run")).rollouts is None


def test_the_optimizers_state_needs_room_only_if_it_is_saved(small_disk: Callable[[int], Path]) -> None:
    folder = small_disk(100 * MIB)
    check_disk(folder, model_bytes=30 * MIB, saves_optimizer=False)
    with pytest.raises(ConfigError, match="save_only_model=True"):
        check_disk(folder, model_bytes=30 * MIB, saves_optimizer=True)


@pytest.mark.usefixtures("nothing_left")
def test_an_output_folder_that_cannot_be_made_is_refused(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be used: .*Not a directory"):
        make_trainer(kind=GRPOTrainer, output_dir=str(tmp_path / "file" / "run"))


# ---- the checks by themselves ----


def test_reward_weights_are_one_each_unless_given() -> None:
    assert check_reward_weights(None, 3) == [1.0, 1.0, 1.0]
    assert check_reward_weights([0.5, 2.0], 2) == [0.5, 2.0]


@pytest.mark.parametrize(
    ("context", "engine_context", "room"), [(100, None, 90), (None, 50, 40), (100, 50, 40), (50, 100, 40), (11, 99, 1)]
)
def test_a_prompt_may_fill_what_a_completion_leaves_of_the_shorter_context(
    context: int | None, engine_context: int | None, room: int
) -> None:
    assert longest_prompt(context, engine_context, 10) == room


def test_a_context_that_nobody_knows_limits_no_prompt() -> None:
    assert longest_prompt(None, None, 10) > 1_000_000


def test_a_context_that_a_completion_fills_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves no room for a prompt in a context of 10 tokens"):
        longest_prompt(10, None, 10)
