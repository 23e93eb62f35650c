"""Each rule refuses what cannot work, and the settings reach the config from Python, the command line and YAML."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import HfArgumentParser

from shoal.config import GRPOConfig
from shoal.config.batch import groups_fill_the_batch, processes_see_whole_sequences, suggest_batch
from shoal.errors import ConfigError


def config(**settings: Any) -> GRPOConfig:
    return GRPOConfig(output_dir="unused", report_to="none", **settings)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_generations": 1}, "num_generations=1 leaves nothing to compare"),
    ({"num_generations": None}, "num_generations=None"),
    ({"num_generations_eval": 0}, "num_generations_eval=0"),
    ({"max_completion_length": 0}, "max_completion_length=0"),
    ({"max_completion_length": None}, "max_completion_length=None"),
    ({"max_completion_length": 12.5}, "not a whole number"),
    ({"learning_rate": "1e-6"}, "1.0e-6"),
    ({"trust_remote_code": "false"}, "yes or no"),
    ({"temperature": 0.0}, "eval_temperature=0"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"eval_temperature": -1.0}, "eval_temperature=-1.0"),
    ({"epsilon": 0.0}, "epsilon=0.0"),
    ({"epsilon_high": -0.1}, "epsilon_high=-0.1"),
    ({"delta": 1.0}, "delta=1.0"),
    ({"beta": -0.1}, "beta=-0.1"),
    ({"loss_type": "dr_grpo"}, "'dapo', 'grpo'"),
    ({"importance_sampling_level": "word"}, "'token', 'sequence'"),
    ({"scale_rewards": "always"}, "'group', 'batch', 'none'"),
    ({"reward_on_error": "zero"}, "reward_on_error='zero'"),
    ({"reward_workers": -1}, "reward_workers=-1"),
    ({"reward_workers": 1.5}, "reward_workers=1.5"),
    ({"vllm_dtype": "int4"}, "vllm_dtype='int4'"),
    ({"num_iterations": 0}, "num_iterations=0"),
    ({"vllm_importance_sampling_clip_min": 3.0}, "not below vllm_importance_sampling_clip_max=3.0"),
    ({"vllm_importance_sampling_clip_max": 0.0}, "excludes every ratio"),
    (
        {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
        "nothing to truncate",
    ),
    ({"reward_weights": []}, "reward_weights"),
    ({"reward_weights": [1.0, float("inf")]}, "reward_weights"),
    ({"vllm_tensor_parallel_size": 0}, "vllm_tensor_parallel_size=0"),
    ({"vllm_pipeline_parallel_size": -1}, "vllm_pipeline_parallel_size=-1"),
    ({"vllm_num_engines": 0}, "vllm_num_engines=0"),
    ({"vllm_devices": 3}, "in quotes"),
    ({"vllm_gpu_memory_utilization": 1.5}, "vllm_gpu_memory_utilization=1.5"),
    ({"vllm_max_model_length": 512}, "no room for a prompt"),
    ({"vllm_max_restarts": -1}, "vllm_max_restarts=-1"),
    ({"vllm_extra_args": {"enable-sleep-mode": True}}, "Set vllm_enable_sleep_mode instead"),
    (
        {"offload_optimizer_during_rollout": True, "vllm_enable_sleep_mode": False},
        "vllm_enable_sleep_mode=False keeps them from sleeping",
    ),
    ({"offload_optimizer_during_rollout": True, "optim": "paged_adamw_8bit"}, "optim='paged_adamw_8bit'"),
    ({"offload_optimizer_during_rollout": True, "optim": "adamw_torch_8bit"}, "8-bit states are small"),
    ({"offload_optimizer_during_rollout": True, "deepspeed": "ds.json"}, "offload_optimizer in DeepSpeed's"),
    ({"vllm_base_port": 80}, "1024 to 65535"),
    ({"vllm_base_port": 65535, "vllm_num_engines": 2}, "65536"),
    ({"vllm_extra_args": {"--tensor-parallel-size": 2}}, "Set vllm_tensor_parallel_size instead"),
    ({"vllm_extra_args": {"api-key": "secret"}}, "Remove it"),
    ({"vllm_extra_args": "--enforce-eager"}, "is not JSON"),
    ({"vllm_extra_args": "[1]"}, "not a mapping"),
    ({"weight_sync_timeout_s": 0.0}, "weight_sync_timeout_s=0.0"),
    ({"reward_timeout_s": float("inf")}, "reward_timeout_s=inf"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
    ({"remove_unused_columns": True}, "by name"),
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
    ({"num_completions_to_print": 2}, "log_completions"),
    ({"num_completions_to_print": -1, "log_completions": True}, "negative"),
    ({"generation_batch_size": 60}, "multiple of 8, or remove it: then generation_batch_size=8"),
    ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "each of 2 micro-steps"),
    ({"steps_per_generation": 4, "generation_batch_size": 64}, "two sizes of one batch"),
    ({"steps_per_generation": 2, "num_generations": 3}, "generation_batch_size=24 or a multiple"),
    ({"per_device_train_batch_size": 6}, "does not divide the 6 completions"),
    ({"accelerator_config": {"split_batches": True}}, "split_batches"),
]


@pytest.mark.parametrize(("settings", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_cannot_work_is_refused_with_the_value_seen(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config(**settings)
    assert said in str(refusal.value)


def test_the_defaults_are_accepted_and_train_on_one_prompt_a_step() -> None:
    defaults = config()
    assert (defaults.completions_per_step, defaults.prompts_per_batch, defaults.steps_per_batch) == (8, 1, 1)


def test_a_checked_config_can_be_changed_with_replace_and_is_checked_again() -> None:
    checked = config(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert dataclasses.replace(checked, num_generations=4).prompts_per_batch == 4
    with pytest.raises(ConfigError, match="num_generations=5"):
        dataclasses.replace(checked, num_generations=5)


def test_batch_settings_that_mean_one_optimizer_step_are_accepted() -> None:
    both = config(gradient_accumulation_steps=2, generation_batch_size=16, steps_per_generation=2)
    assert (both.completions_per_step, both.steps_per_batch) == (16, 1)


def test_completions_written_at_once_may_be_trained_on_in_several_steps_and_more_than_once() -> None:
    by_size = config(generation_batch_size=32, num_iterations=3, num_generations=16)
    by_steps = config(steps_per_generation=8, gradient_accumulation_steps=2, num_iterations=3)
    assert (by_size.parts_per_batch, by_size.steps_per_batch, by_size.prompts_per_batch) == (4, 12, 2)
    assert (by_steps.parts_per_batch, by_steps.steps_per_batch, by_steps.prompts_per_batch) == (4, 12, 8)


def test_bf16_is_off_by_default_where_no_gpu_can_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.config.grpo_config.is_torch_bf16_gpu_available", lambda: False)
    assert config().bf16 is False


def test_bf16_is_off_by_default_when_training_on_cpus_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.config.grpo_config.is_torch_bf16_gpu_available", lambda: True)
    assert config(use_cpu=True).bf16 is False


def test_a_single_process_never_spreads_over_the_gpus_of_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert config().n_gpu == 1


def test_an_engine_takes_most_of_its_own_gpu_and_less_of_a_shared_one() -> None:
    assert config().engine_memory_utilization(colocated=False) == 0.9
    assert config().engine_memory_utilization(colocated=True) == 0.6
    assert config(vllm_enable_sleep_mode=False).engine_memory_utilization(colocated=True) == 0.3
    assert config(vllm_gpu_memory_utilization=0.5).engine_memory_utilization(colocated=True) == 0.5


def test_settings_are_read_from_a_command_line() -> None:
    words = ["--output_dir", "unused", "--report_to", "none", "--vllm-devices", "4-7", "--reward_weights", "1", "2.5"]
    words += ["--vllm_extra_args", '{"enforce-eager": true}', "--scale_rewards", "False", "--no_shuffle_dataset"]
    (parsed,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(words)
    assert parsed.vllm_devices == "4-7"
    assert parsed.reward_weights == [1.0, 2.5]
    assert parsed.vllm_extra_args == {"enforce-eager": True}
    assert parsed.scale_rewards == "none"
    assert parsed.shuffle_dataset is False


def test_settings_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("output_dir: unused\nreport_to: none\nlearning_rate: 2.0e-6\nvllm_extra_args: {max-num-seqs: 8}\n")
    (parsed,) = HfArgumentParser(GRPOConfig).parse_yaml_file(str(path))
    assert (parsed.learning_rate, parsed.vllm_extra_args) == (2e-6, {"max-num-seqs": 8})


def test_help_is_written_for_every_setting() -> None:
    text = HfArgumentParser(GRPOConfig).format_help()
    assert "--vllm_devices" in text
    assert not [name for name in GRPOConfig.__annotations__ if f"--{name}" not in text]


@pytest.mark.parametrize(("cp_size", "sp_size"), [(2, 1), (1, 2)])
def test_sequences_split_over_processes_are_refused(cp_size: int, sp_size: int) -> None:
    split = SimpleNamespace(cp_size=cp_size, sp_size=sp_size, cp_enabled=cp_size > 1, sp_enabled=sp_size > 1)
    fake: Any = SimpleNamespace(parallelism_config=split)
    with pytest.raises(ConfigError, match=f"cp_size={cp_size} and sp_size={sp_size}"):
        processes_see_whole_sequences(fake)


def check_batch(*, per_device: int, world_size: int, accumulation: int, num_generations: int) -> None:
    fake: Any = SimpleNamespace(
        completions_per_step=per_device * world_size * accumulation,
        parts_per_batch=1,
        per_device_train_batch_size=per_device,
        world_size=world_size,
        gradient_accumulation_steps=accumulation,
        num_generations=num_generations,
    )
    groups_fill_the_batch(fake)


@given(
    per_device=st.integers(1, 12),
    world_size=st.integers(1, 8),
    accumulation=st.integers(1, 6),
    group=st.integers(2, 16),
)
def test_every_batch_that_a_refusal_suggests_is_accepted(
    per_device: int, world_size: int, accumulation: int, group: int
) -> None:
    seen = {"per_device": per_device, "world_size": world_size, "accumulation": accumulation, "num_generations": group}
    try:
        check_batch(**seen)
    except ConfigError as refusal:
        found = suggest_batch(**seen)
        for size in found.num_generations:
            assert str(size) in str(refusal)
            check_batch(**seen | {"num_generations": size})
        check_batch(**seen | {"per_device": found.per_device_train_batch_size})
        check_batch(**seen | {"accumulation": found.gradient_accumulation_steps})
        assert f"per_device_train_batch_size={found.per_device_train_batch_size}" in str(refusal)
        assert f"gradient_accumulation_steps={found.gradient_accumulation_steps}" in str(refusal)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"old_logprobs": "engine"}, "old_logprobs"),
        ({"old_logprobs": "rollout"}, "vllm_importance_sampling_correction=False"),
        ({"skip_zero_advantages": True, "beta": 0.1}, "skip_zero_advantages"),
    ],
)
def test_old_logprobs_and_skipping_that_contradict_other_settings_are_refused(
    settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        GRPOConfig(output_dir="unused", **settings)
    GRPOConfig(output_dir="unused", old_logprobs="rollout", vllm_importance_sampling_correction=False)
