"""A run's file: what it says is taken, and what would be ignored is refused with the nearest name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from shoal import GRPOTrainer
from shoal.cli.main import main
from shoal.errors import ConfigError, DatasetError
from shoal.testing import tiny_model, tiny_tokenizer
from shoal.testing.trainer import ReferenceTrainer
from shoal.trainer import run_parts
from shoal.trainer.run_file import DatasetSpec, RewardSpec, parse_run, read_run_file
from shoal.trainer.run_parts import load_reward, load_split, make_peft_config

ROOT = Path(__file__).resolve().parents[2]
LEAST: dict[str, Any] = {"model": "m", "train_dataset": "d.jsonl", "reward_funcs": "accuracy_reward"}


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    content = LEAST | {"learning_rate": 1e-5, "peft_config": {"r": 4}, "reward_funcs": ["a:b", {"c.d:e": {"f": 1}}]}
    (tmp_path / "run.json").write_text(json.dumps(content))
    (tmp_path / "run.yaml").write_text(
        "model: m\ntrain_dataset: d.jsonl\nlearning_rate: 1.0e-5\npeft_config: {r: 4}\n"
        "reward_funcs:\n  - a:b\n  - c.d:e: {f: 1}\n"
    )
    read = read_run_file(tmp_path / "run.yaml")
    assert read == read_run_file(tmp_path / "run.json")
    assert read.rewards == (RewardSpec(target="a:b"), RewardSpec(target="c.d:e", arguments={"f": 1}))
    assert read.settings == {"learning_rate": 1e-5} and read.peft_config == {"r": 4}
    assert read.train_dataset == DatasetSpec(path="d.jsonl") and read.eval_dataset is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learnin_rate": 1}, "'learnin_rate' is not a setting, so it would be ignored. Did you mean 'learning_rate'"),
        ({"reward_func": "x"}, "Did you mean 'reward_funcs'"),
        ({"model": None}, "has no model"),
        ({"model": 3}, "is no text"),
        ({"train_dataset": {"path": "x", "splitt": "train"}}, "Did you mean 'split'"),
        ({"train_dataset": {"split": "train"}}, "has no path"),
        ({"train_dataset": 3}, "is no dataset"),
        ({"reward_funcs": []}, "has no reward_funcs"),
        ({"reward_funcs": [3]}, "reward_funcs has 3"),
        ({"peft_config": "lora"}, "not a mapping"),
    ],
)
def test_what_would_be_ignored_or_is_missing_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_run(LEAST | changes, "run.yaml")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "model: m\nmodel: n\n", "'model' is there twice"),
        ("a.json", '{"model": 1, "model": 2}', "'model' is there twice"),
        ("a.yaml", "- model\n", "holds no mapping"),
        ("a.yaml", "model: [", "is not valid"),
        ("a.yaml", None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_run_file(tmp_path / name)


def test_rewards_come_from_files_modules_and_shoal(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def one(completions, **_):\n    return [1.0] * len(completions)\n\nNOT = 3\n")
    assert load_reward(RewardSpec(target=f"{tmp_path / 'mine.py'}:one"))(["a", "b"]) == [1.0, 1.0]
    assert load_reward(RewardSpec(target="math:sqrt"))(4.0) == 2.0
    assert load_reward(RewardSpec(target="think_format_reward"))(["<think>a</think>b", "b"]) == [1.0, 0.0]
    arguments = {"max_completion_len": 4, "soft_punish_cache": 2}
    punish = load_reward(RewardSpec(target="get_soft_overlong_punishment", arguments=arguments))
    assert punish(completion_ids=[[1], [1] * 9]) == [0.0, -1.0]
    for target, says in (
        (f"{tmp_path / 'mine.py'}:two", "has no 'two'"),
        (f"{tmp_path / 'mine.py'}:NOT", "cannot be called"),
        (f"{tmp_path / 'other.py'}:one", "does not exist"),
        ("no_such_module_here:one", "there is no module"),
        ("acuracy_reward", "Did you mean 'accuracy_reward'"),
        ("get_soft_overlong_punishment", "needs arguments"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_reward(RewardSpec(target=target))


def test_datasets_come_from_files(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(load_split(DatasetSpec(path=str(tmp_path / "d.jsonl")))) == rows
    assert len(load_split(DatasetSpec(path=str(tmp_path / "d.jsonl"), split="train[:1]"))) == 1
    with pytest.raises(DatasetError, match="does not exist"):
        load_split(DatasetSpec(path=str(tmp_path / "e.jsonl")))
    with pytest.raises(DatasetError, match=r"split 'test', cannot be loaded"):
        load_split(DatasetSpec(path=str(tmp_path / "d.jsonl"), split="test"))


def test_an_adapter_s_fields_are_checked() -> None:
    assert make_peft_config({"r": 4}).task_type == "CAUSAL_LM"
    with pytest.raises(ConfigError, match="Did you mean 'lora_alpha'"):
        make_peft_config({"lora_alfa": 4})


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the example's file, with a model that is there, in a folder of its own."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    text = (ROOT / "examples" / "config.yaml").read_text().replace("path-or-id", "model")
    (tmp_path / "config.yaml").write_text(text + "use_cpu: true\nbf16: false\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config.yaml"


def test_the_example_is_fine_and_a_slip_in_it_is_one_line(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(example), "--check"]) == 0
    assert "is fine: 8 prompts x 8 at a time" in capsys.readouterr().out
    example.write_text(example.read_text().replace("num_generations", "num_generation"))
    assert main(["train", str(example)]) == 2
    said = capsys.readouterr().err
    assert "'num_generation' is not a setting" in said and said.count("\n") == 1


def test_a_run_trains_and_leaves_its_model(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_parts, "GRPOTrainer", ReferenceTrainer)
    text = (
        example.read_text()
        .replace("max_steps: 20", "max_steps: 2")
        .replace("train_batch_size: 64", "train_batch_size: 8")
    )
    example.write_text(text + "save_strategy: steps\nsave_steps: 1\nlearning_rate_is: 0\n")
    assert main(["train", str(example)]) == 2  # the control: a slip at the end of the file
    example.write_text(text + "save_strategy: steps\nsave_steps: 1\n")
    assert main(["train", str(example)]) == 0
    assert "The trained model is in runs/sums/model" in capsys.readouterr().out
    assert (example.parent / "runs" / "sums" / "model" / "model.safetensors").exists()
    steps = [json.loads(line)["step"] for line in Path("runs/sums/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2
    example.write_text(text.replace("max_steps: 2", "max_steps: 3") + "save_strategy: steps\nsave_steps: 1\n")
    assert main(["train", str(example), "--resume"]) == 0
    resumed = [json.loads(line)["step"] for line in Path("runs/sums/metrics.jsonl").read_text().splitlines()]
    assert resumed.count(2) == steps.count(2) and max(resumed) == 3


def test_the_example_script_makes_the_same_run(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Made(GRPOTrainer):
        def train(self, *args: Any, **kwargs: Any) -> None:
            made.append(self)

        def save_model(self, *args: Any, **kwargs: Any) -> None:
            assert made

    spec = importlib.util.spec_from_file_location("example_train", ROOT / "examples" / "train.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "GRPOTrainer", Made)
    monkeypatch.setattr("sys.argv", ["train.py", "model"])
    script.main()
    written = read_run_file(example).settings
    assert {name: getattr(made[0].args, name) for name in written} == {
        name: [] if name == "report_to" else value for name, value in written.items()
    } | {"use_cpu": made[0].args.use_cpu}
    assert list(made[0].train_dataset) == list(load_split(DatasetSpec(path="examples/sums.jsonl")))


def test_processes_are_started_by_one_launcher_only(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    def execv(program: str, words: list[str]) -> None:
        started.append(words)
        raise SystemExit(0)

    monkeypatch.setattr("os.execv", execv)
    with pytest.raises(SystemExit):
        main(["train", str(example), "--trainer-processes", "2", "--resume"])
    assert started[0][1:3] == ["-m", "torch.distributed.run"]
    assert started[0][-5:] == ["-m", "shoal", "train", str(example), "--resume"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(example), "--trainer-processes", "2"]) == 2
    assert "has started this process already" in capsys.readouterr().err
