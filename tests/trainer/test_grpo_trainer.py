"""`GRPOTrainer` with everything but vLLM real: it learns, saves and is used as transformers' users expect."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from shoal import GRPOConfig, GRPOTrainer
from shoal.errors import NoEngineError, RewardError
from shoal.testing import tiny_model, tiny_tokenizer
from shoal.testing.trainer import ReferenceTrainer

MakeTrainer = Callable[..., Any]


class Events(TrainerCallback):  # type: ignore[misc]
    """Notes what transformers says, and which weights the engine holds then."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.logs: list[dict[str, Any]] = []
        self.trainer: Any = None
        self.versions: list[tuple[int, int]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.names.append("train begins")

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.names.append("step begins")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.names.append("step ends")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.names.append("logs")
        self.logs.append(dict(logs))
        if self.trainer is not None and self.trainer.rollouts is not None:
            self.versions.append((self.trainer.rollouts.version, state.global_step))

    def on_save(self, *_: Any, **__: Any) -> None:
        self.names.append("saves")

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.names.append("evaluates")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.names.append("train ends")


class Raises(TrainerCallback):  # type: ignore[misc]
    """Interrupts a run at the end of a step."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise self._error


def steps(trainer: Any) -> list[dict[str, Any]]:
    """The log's lines about training steps."""
    return [line for line in trainer.state.log_history if "loss" in line]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


# ---- learning ----


def test_the_reward_rises_when_it_is_learnt_and_not_without_a_learning_rate(make_trainer: MakeTrainer) -> None:
    rewards = {}
    for learning_rate, max_steps in ((1e-2, 25), (0.0, 8)):
        trainer = make_trainer(
            learning_rate=learning_rate, max_steps=max_steps, per_device_train_batch_size=16, num_generations=8
        )
        trainer.train()
        rewards[learning_rate] = [line["reward"] for line in steps(trainer)]
    assert np.mean(rewards[1e-2][:4]) < 0.5
    assert np.mean(rewards[1e-2][-4:]) > 0.75
    assert abs(np.mean(rewards[0.0][-4:]) - np.mean(rewards[0.0][:4])) < 0.15


def test_a_run_with_the_same_seed_is_the_same_run(make_trainer: MakeTrainer) -> None:
    runs = {}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        trainer = make_trainer(seed=seed, max_steps=3)
        trainer.train()
        runs[name] = weights(trainer)
    assert all(torch.equal(runs["again"][name], value) for name, value in runs["one"].items())
    assert any(not torch.equal(runs["other"][name], value) for name, value in runs["one"].items())


def test_epochs_end_with_their_last_whole_step(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer.train()
    # 8 prompts, of which a step takes 8 * 2 / 4.
    assert trainer.state.global_step == 4 and trainer.state.epoch == 2.0


# ---- transformers' parts ----


def test_callbacks_are_called_in_order_and_logs_follow_the_publish(make_trainer: MakeTrainer) -> None:
    events = Events()
    trainer = make_trainer(callbacks=[events], max_steps=2, save_strategy="steps", save_steps=2)
    events.trainer = trainer
    trainer.train()
    step = ["step begins", "step ends", "logs"]
    assert events.names == ["train begins", *step, *step, "saves", "logs", "train ends"]
    assert events.logs[0]["reward"] == steps(trainer)[0]["reward"]
    assert events.versions == [(1, 1), (2, 2), (2, 2)]


def test_weights_are_published_once_before_the_first_step_and_once_after_each(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=3, gradient_accumulation_steps=2, max_tokens_per_micro_batch=6)
    trainer.train()
    assert trainer.rollouts.published == [0, 1, 2, 3]
    assert trainer.rollouts.version == trainer.state.global_step == 3


def test_schedulers_set_the_learning_rate(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=4, learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=1)
    trainer.train()
    rates = [line["learning_rate"] for line in steps(trainer)]
    expected = [0.0, *(1e-3 * 0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(3))]
    assert rates == pytest.approx(expected)


def test_the_gradients_norm_is_clipped(make_trainer: MakeTrainer) -> None:
    changes = {}
    for max_norm in (1e-3, 1e3):
        model = tiny_model()
        trainer = make_trainer(
            model=model,
            max_steps=1,
            max_grad_norm=max_norm,
            lr_scheduler_type="constant",
            optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
        )
        before = weights(trainer)
        trainer.train()
        changes[max_norm] = math.sqrt(sum(float((v - before[n]).square().sum()) for n, v in weights(trainer).items()))
        norm = steps(trainer)[0]["grad_norm"]
    assert changes[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert changes[1e3] == pytest.approx(norm, rel=1e-3) and norm > 0.01


def test_a_checkpoint_is_an_ordinary_one_with_the_weights_and_the_tokenizer(
    make_trainer: MakeTrainer, settings: dict[str, Any]
) -> None:
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    folder = Path(settings["output_dir"]) / "checkpoint-2"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in loaded.named_parameters():
        assert torch.equal(value, trainer.model.get_parameter(name)), name
    assert (folder / "tokenizer.json").exists() and (folder / "optimizer.pt").exists()
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no more")])
def test_engines_end_when_the_training_is_interrupted_and_start_again_with_it(
    make_trainer: MakeTrainer, error: BaseException
) -> None:
    interrupts = Raises(error)
    trainer = make_trainer(callbacks=[interrupts])
    with pytest.raises(type(error)):
        trainer.train()
    assert trainer.rollouts is None
    trainer.remove_callback(interrupts)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.rollouts.published == [0, 1, 2]


class LosesItsEngines(ReferenceTrainer):
    """Has no engine any more when a step begins."""

    loses_them_at = 2

    def score(self, *arguments: Any, **keywords: Any) -> Any:
        if self.state.global_step == self.loses_them_at:
            raise NoEngineError("no engine is left: engine-0 died (see engine-0.log)")
        return super().score(*arguments, **keywords)


def test_when_no_engine_is_left_the_last_step_is_saved_and_a_new_run_goes_on_from_there(
    make_trainer: MakeTrainer, settings: dict[str, Any], tmp_path: Path
) -> None:
    trainer = make_trainer(kind=LosesItsEngines, max_steps=3)
    with pytest.raises(NoEngineError, match=r"engine-0 died"):
        trainer.train()
    assert trainer.rollouts is None
    assert [folder.name for folder in Path(settings["output_dir"]).glob("checkpoint-*")] == ["checkpoint-2"]
    following, whole = make_trainer(max_steps=3), make_trainer(max_steps=3, output_dir=str(tmp_path / "whole"))
    following.train(resume_from_checkpoint=True)
    whole.train()
    assert following.state.global_step == 3
    for name, value in following.model.named_parameters():
        assert torch.equal(value, whole.model.get_parameter(name)), name


def test_when_the_first_step_finds_no_engine_there_is_nothing_to_save(
    make_trainer: MakeTrainer, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LosesItsEngines, "loses_them_at", 0)
    with pytest.raises(NoEngineError):
        make_trainer(kind=LosesItsEngines).train()
    assert not list(Path(settings["output_dir"]).glob("checkpoint-*"))


def test_a_reward_that_fails_in_a_later_step_ends_the_run_with_its_name(make_trainer: MakeTrainer) -> None:
    def fails_later(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        if trainer_state is not None and trainer_state.global_step == 1:
            raise ValueError("out of luck")
        return [0.0] * len(completions)

    trainer = make_trainer(rewards=fails_later)
    with pytest.raises(RewardError, match=r"'fails_later'.*ValueError: out of luck"):
        trainer.train()
    assert trainer.state.global_step == 1 and trainer.rollouts is None


# ---- precision, adapters, the reference ----


def test_bfloat16_computes_in_bfloat16_and_keeps_full_weights(make_trainer: MakeTrainer) -> None:
    types: dict[bool, set[torch.dtype]] = {}
    for bf16 in (True, False):
        model = tiny_model()
        found = types.setdefault(bf16, set())
        model.lm_head.register_forward_hook(
            lambda module, inputs, output, found=found: found.add(output.dtype) if module.training else None
        )
        trainer = make_trainer(model=model, bf16=bf16)
        before = weights(trainer)
        trainer.train()
        assert {value.dtype for value in trainer.model.parameters()} == {torch.float32}
        assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())
        assert all(math.isfinite(line["loss"]) for line in steps(trainer))
    assert types == {True: {torch.bfloat16}, False: {torch.float32}}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_kl_term_is_exactly_zero_until_the_policy_leaves_its_reference(
    make_trainer: MakeTrainer, bf16: bool
) -> None:
    trainer = make_trainer(beta=0.1, bf16=bf16, learning_rate=1e-2, max_steps=2)
    trainer.train()
    first, second = (line["kl"] for line in steps(trainer))
    assert first == 0.0 and second > 1e-4


def test_without_a_kl_term_none_is_logged_and_no_reference_is_kept(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(beta=0.0, max_steps=1)
    trainer.train()
    assert "kl" not in steps(trainer)[0] and trainer._reference is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_is_trained_and_the_weights_below_it_are_not(
    make_trainer: MakeTrainer, settings: dict[str, Any], checkpointing: bool
) -> None:
    trainer = make_trainer(
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
        beta=0.1,
        learning_rate=1e-2,
        max_steps=3,
        gradient_checkpointing=checkpointing,
        save_strategy="steps",
        save_steps=3,
    )
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    adapter = {name for name in before if "lora_" in name}
    assert changed == adapter and adapter
    # The reference is the base without its adapter, which at the start adds nothing.
    kl = [line["kl"] for line in steps(trainer)]
    assert kl[0] == 0.0 and kl[-1] > 0
    saved = {path.name for path in (Path(settings["output_dir"]) / "checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved


# ---- scripts ----

TRL_SCRIPT = """
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

dataset = Dataset.from_dict({"prompt": ["The sky is", "The sun is"] * 8})

def reward_num_unique_chars(completions, **kwargs):
    return [len(set(c)) for c in completions]

training_args = GRPOConfig(
    output_dir=OUTPUT_DIR,
    learning_rate=1e-5,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_generations=4,
    max_completion_length=32,
    temperature=0.9,
    beta=0.04,
    loss_type="dapo",
    scale_rewards=False,
    mask_truncated_completions=True,
    use_vllm=True,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
)
trainer = GRPOTrainer(
    model=MODEL,
    reward_funcs=reward_num_unique_chars,
    args=training_args,
    train_dataset=dataset,
)
"""


def test_a_script_for_trl_runs_with_its_import_replaced(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    names: dict[str, Any] = {"MODEL": str(model), "OUTPUT_DIR": str(tmp_path / "run")}
    exec(TRL_SCRIPT.replace("from trl import", "from shoal import"), names)
    trainer = names["trainer"]
    assert type(trainer) is GRPOTrainer and trainer.rollouts is None
    assert trainer.args.scale_rewards == "none" and trainer.args.prompts_per_batch == 2
    assert trainer.processing_class.eos_token == "</s>"
    assert torch.equal(trainer.model.get_input_embeddings().weight, tiny_model().get_input_embeddings().weight)


def test_without_settings_the_run_is_named_after_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "some-model"
    tiny_model(max_position_embeddings=2048).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    trainer = GRPOTrainer(
        str(model),
        lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
    )
    assert isinstance(trainer.args, GRPOConfig) and trainer.args.output_dir == "some-model-GRPO"
