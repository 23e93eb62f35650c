"""What settings must satisfy by themselves, before any device is looked at: one function a rule."""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Callable
from dataclasses import fields
from numbers import Integral
from typing import TYPE_CHECKING

from shoal.config.elsewhere import (
    attached_engines_are_made_elsewhere,
    ray_decides_where,
    settings_for_elsewhere_are_used,
)
from shoal.config.trl_only import refuse_trl_only
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.config.grpo_config import GRPOConfig

_CHOICES = {
    "loss_type": ("dapo", "grpo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "old_logprobs": ("policy", "rollout"),
    "vllm_launcher": ("local", "ray"),
    "vllm_model_impl": ("vllm", "transformers"),
    "vllm_dtype": (None, "auto", "float32", "bfloat16", "float16"),
    "reward_on_error": ("raise", "drop"),
    "vllm_lora_sync": ("merge", "adapter"),
    "weight_sync_backend": ("auto", "ipc", "nccl"),
    "weight_sync_verify": ("digest", "full", "off"),
}

_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "generation_batch_size",
    "num_iterations",
    "num_generations_eval",
    "max_completion_length",
    "max_tokens_per_micro_batch",
    "vllm_tensor_parallel_size",
    "vllm_pipeline_parallel_size",
    "vllm_num_engines",
)
_MAY_BE_UNSET = (
    "steps_per_generation",
    "generation_batch_size",
    "num_generations_eval",
    "max_tokens_per_micro_batch",
    "vllm_num_engines",
)

_TIMEOUTS = (
    "vllm_startup_timeout_s",
    "vllm_request_timeout_s",
    "vllm_stall_timeout_s",
    "weight_sync_timeout_s",
    "reward_timeout_s",
)

# Settings of transformers that GRPO leaves no room for: the value to keep, and why.
_FIXED: dict[str, tuple[object, str]] = {
    "auto_find_batch_size": (
        False,
        "A smaller batch after an out-of-memory error would cut groups of completions apart. "
        "Lower per_device_train_batch_size or max_tokens_per_micro_batch instead.",
    ),
    "label_smoothing_factor": (0.0, "There are no labels to smooth: the loss is the policy gradient's."),
    "neftune_noise_alpha": (None, "Noise in the embeddings would make the trainer another policy than the engines."),
    "remove_unused_columns": (False, "Reward functions are handed the dataset's other columns by name."),
    "train_sampling_strategy": ("random", "The order of prompts is Shoal's own; see shuffle_dataset and data_seed."),
}

# Flags of `vllm serve` that have a setting of their own, or that Shoal has to decide (None).
_SERVE_FLAGS: dict[str, str | None] = {
    "api_key": None,
    "data_parallel_size": None,
    "dp": None,
    "dtype": "vllm_dtype",
    "enable_sleep_mode": "vllm_enable_sleep_mode",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "host": None,
    "logprobs_mode": None,
    "max_logprobs": None,
    "max_model_len": "vllm_max_model_length",
    "middleware": None,
    "model": None,
    "model_impl": "vllm_model_impl",
    "pipeline_parallel_size": "vllm_pipeline_parallel_size",
    "port": "vllm_base_port",
    "pp": "vllm_pipeline_parallel_size",
    "served_model_name": None,
    "tensor_parallel_size": "vllm_tensor_parallel_size",
    "tp": "vllm_tensor_parallel_size",
    "trust_remote_code": "trust_remote_code",
    "weight_transfer_config": None,
}


# Those whose states are plain tensors; the others have quantised, paged or hidden ones.
_MOVABLE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


def numbers_are_not_text(config: GRPOConfig) -> None:
    """Refuse text where a number or a yes/no belongs: YAML reads `1e-6` as text, and `"false"` would count as true."""
    hints = typing.get_type_hints(type(config))
    for declared in fields(config):
        value, hint = getattr(config, declared.name, None), hints[declared.name]
        kinds = {*(typing.get_args(hint) if _is_union(hint) else (hint,))} - {type(None)}
        if isinstance(value, str) and kinds == {bool}:
            raise ConfigError(f"{declared.name}={value!r} is text, but yes or no is needed. Write it without quotes.")
        if isinstance(value, str) and kinds <= {int, float}:
            raise ConfigError(
                f"{declared.name}={value!r} is text, but a number is needed. Write it without quotes; "
                "in YAML, a number with an exponent needs a point: 1.0e-6."
            )
        if kinds == {int} and value is not None and not isinstance(value, Integral):
            raise ConfigError(f"{declared.name}={value!r} is not a whole number, which it counts in. Round it.")


def counts_are_positive(config: GRPOConfig) -> None:
    """Refuse sizes and counts below 1, and missing ones that have no other meaning."""
    for name in _AT_LEAST_ONE:
        value = getattr(config, name)
        if value is None and name not in _MAY_BE_UNSET:
            raise ConfigError(f"{name}=None leaves open how many are meant. Give a whole number of at least 1.")
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is too small to mean anything. Set it to 1 or more.")


def blocks_are_treated_one_way(config: GRPOConfig) -> None:
    """Refuse to compile blocks within a model that is compiled, and to count blocks of which none is computed again."""
    if config.regional_compilation and config.torch_compile:
        raise ConfigError("regional_compilation=True and torch_compile=True compile the same code. Set one of them.")
    count = config.recompute_num_layers
    if count is None:
        return
    if not config.gradient_checkpointing:
        raise ConfigError(
            f"recompute_num_layers={count} says how far gradient checkpointing goes, and gradient_checkpointing is "
            "off. Turn it on, or unset recompute_num_layers."
        )
    if count < 0:
        raise ConfigError(f"recompute_num_layers={count} is no number of blocks. Set it to 0 or more.")


def timeouts_are_positive(config: GRPOConfig) -> None:
    """Refuse time-outs that have passed before the wait begins, and endless ones."""
    for name in _TIMEOUTS:
        value = getattr(config, name)
        if value is None or not 0 < value < math.inf:
            raise ConfigError(f"{name}={value} is no time to wait: every wait has an end. Give seconds above 0.")


def values_are_known(config: GRPOConfig) -> None:
    """Refuse a name that is not one of those a setting can take."""
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            known = ", ".join(repr(choice) for choice in choices)
            raise ConfigError(f"{name}={value!r} is not supported. Set it to one of: {known}.")


def transformers_settings_fit(config: GRPOConfig) -> None:
    """Refuse settings of transformers that would be ignored, or that would break what GRPO rests on."""
    for name, (kept, why) in _FIXED.items():
        value = getattr(config, name)
        if value != kept:
            raise ConfigError(f"{name}={value!r} does not go with GRPO in Shoal. {why} Set {name}={kept!r}.")


def groups_can_be_compared(config: GRPOConfig) -> None:
    """Refuse groups of one: an advantage compares a completion with the others of its prompt."""
    if config.num_generations is None or config.num_generations < 2:
        raise ConfigError(
            f"num_generations={config.num_generations} leaves nothing to compare: a completion's advantage is how much "
            "better it is than the others of its prompt. Set num_generations to 2 or more."
        )


def engines_generate(config: GRPOConfig) -> None:
    """Refuse generation without vLLM."""
    if config.use_vllm is False:
        raise ConfigError(
            "use_vllm=False cannot be obeyed: Shoal always generates with vLLM engines (on CPUs too). Remove it."
        )


def temperatures_fit(config: GRPOConfig) -> None:
    """Refuse temperatures that logits cannot be divided by."""
    if not 0 < config.temperature < math.inf:
        raise ConfigError(
            f"temperature={config.temperature} cannot be used for training: logits are divided by it, and greedy "
            "completions of a prompt would all be the same. Set it above 0; eval_temperature=0 evaluates greedily."
        )
    if config.eval_temperature is not None and not 0 <= config.eval_temperature < math.inf:
        raise ConfigError(f"eval_temperature={config.eval_temperature} is no temperature. Set it to 0 or more.")


def filters_leave_tokens(config: GRPOConfig) -> None:
    """Refuse sampling filters that leave nothing, or nothing to choose from."""
    if config.top_p is None or not 0 < config.top_p <= 1:
        raise ConfigError(f"top_p={config.top_p} is no probability to reach. Set it above 0 and up to 1; 1 is off.")
    if config.top_k is not None and (config.top_k < -1 or config.top_k == 1):
        why = "leaves one token, so that all completions of a prompt are the same" if config.top_k == 1 else "is none"
        raise ConfigError(f"top_k={config.top_k} {why}. Set it to 2 or more, or to 0 for all tokens.")
    if config.min_p is not None and not 0 <= config.min_p < 1:
        raise ConfigError(f"min_p={config.min_p} leaves no choice of tokens. Set it from 0 (off) to below 1.")


def clipping_leaves_room(config: GRPOConfig) -> None:
    """Refuse clipping ranges that no ratio, or not even the ratio 1, can lie in."""
    if not config.epsilon > 0:
        raise ConfigError(f"epsilon={config.epsilon} would clip every change of the policy. Set it above 0, as 0.2.")
    if config.epsilon_high is not None and not config.epsilon_high > 0:
        raise ConfigError(f"epsilon_high={config.epsilon_high} would clip every gain. Set it above 0, or unset it.")
    if config.delta is not None and not config.delta > 1:
        raise ConfigError(
            f"delta={config.delta} would stop every token with a negative advantage, whose ratio starts at 1. "
            "Set it above 1 + epsilon, or unset it."
        )
    if not config.beta >= 0:
        raise ConfigError(f"beta={config.beta} would reward distance from the reference model. Set it to 0 or more.")


def correction_bounds_fit(config: GRPOConfig) -> None:
    """Refuse bounds of the off-policy correction that exclude every ratio, or that are both missing."""
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if high is not None and not high > 0:
        raise ConfigError(f"vllm_importance_sampling_clip_max={high} excludes every ratio. Set it above 1, as 3.0.")
    if low is not None and high is not None and not low < high:
        raise ConfigError(
            f"vllm_importance_sampling_clip_min={low} is not below vllm_importance_sampling_clip_max={high}, so no "
            "ratio lies between them. Set clip_min below 1 and clip_max above 1, or unset one."
        )
    mode = config.vllm_importance_sampling_mode
    if config.vllm_importance_sampling_correction and mode.endswith("_truncate") and low is None and high is None:
        raise ConfigError(
            f"vllm_importance_sampling_mode={mode!r} has nothing to truncate at: both bounds are unset. "
            "Set vllm_importance_sampling_clip_max, as 3.0."
        )


def nothing_is_corrected_twice(config: GRPOConfig) -> None:
    """Refuse a correction towards the engine where the ratio is taken against the engine already."""
    if config.old_logprobs == "rollout" and config.vllm_importance_sampling_correction:
        raise ConfigError(
            'old_logprobs="rollout" takes the ratio of the loss against the engines, and '
            "vllm_importance_sampling_correction=True would weigh by the gap to them once more. Set "
            'vllm_importance_sampling_correction=False, or old_logprobs="policy".'
        )


def skipped_completions_teach_nothing(config: GRPOConfig) -> None:
    """Refuse to skip completions that still have a KL term."""
    if config.skip_zero_advantages and config.beta != 0:
        raise ConfigError(
            f"skip_zero_advantages=True would leave out the KL term of completions with advantage 0, which beta="
            f"{config.beta} gives a gradient. Unset skip_zero_advantages, or set beta=0."
        )


def weights_are_numbers(config: GRPOConfig) -> None:
    """Refuse reward weights that are empty, infinite or not numbers; their count is checked with the functions."""
    weights = config.reward_weights
    if weights is None:
        return
    if not weights or not all(isinstance(weight, int | float) and math.isfinite(weight) for weight in weights):
        raise ConfigError(
            f"reward_weights={weights!r} cannot weight rewards. Give one finite number for each reward function."
        )


def workers_can_be_counted(config: GRPOConfig) -> None:
    """Refuse fewer than no worker processes for rewards."""
    if config.reward_workers is None or config.reward_workers < 0:
        raise ConfigError(
            f"reward_workers={config.reward_workers} is no number of processes. Set 0 to call reward functions on "
            "threads of the trainer, or as many as may be called at once."
        )


def engine_settings_fit(config: GRPOConfig) -> None:
    """Refuse values that no engine can be started with; which devices exist is the placement's to check."""
    if not isinstance(config.vllm_devices, str) or not config.vllm_devices.strip():
        raise ConfigError(f'vllm_devices={config.vllm_devices!r} is no text. Write it in quotes, such as "cuda:1".')
    if config.vllm_max_restarts is None or config.vllm_max_restarts < 0:
        raise ConfigError(
            f"vllm_max_restarts={config.vllm_max_restarts} is no number of attempts. Set it to 0 for none, or above."
        )
    share = config.vllm_gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"vllm_gpu_memory_utilization={share} is no share of memory. Set it above 0 and up to 1.")
    length = config.vllm_max_model_length
    if length is not None and length <= config.max_completion_length:
        raise ConfigError(
            f"vllm_max_model_length={length} leaves no room for a prompt beside max_completion_length="
            f"{config.max_completion_length} tokens. Raise the one or lower the other."
        )


def offloading_has_a_purpose(config: GRPOConfig) -> None:
    """Refuse to offload optimizer states that cannot be moved, or where nothing uses the memory meanwhile."""
    if not config.offload_optimizer_during_rollout:
        return
    if config.vllm_enable_sleep_mode is False:
        raise ConfigError(
            "offload_optimizer_during_rollout=True frees memory for engines that take it when they wake, but "
            "vllm_enable_sleep_mode=False keeps them from sleeping. Remove one of the two."
        )
    if config.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        raise ConfigError(
            "offload_optimizer_during_rollout=True cannot move the states of DeepSpeed's optimizer, which it keeps in "
            "partitions of its own. Remove it; to keep them in host memory, set offload_optimizer in DeepSpeed's "
            "zero_optimization."
        )
    name = str(getattr(config.optim, "value", config.optim))
    if name not in _MOVABLE_OPTIMIZERS:
        raise ConfigError(
            f"offload_optimizer_during_rollout=True cannot move the states of optim={name!r}, which are not plain "
            "tensors. Use one of torch's own, such as adamw_torch_fused, or remove the setting: 8-bit states are small "
            "and paged ones leave the GPU by themselves when memory runs short."
        )


def ports_exist(config: GRPOConfig) -> None:
    """Refuse ports that a user cannot listen on."""
    first = config.vllm_base_port
    if first is None:
        return
    last = first + (config.vllm_num_engines or 1) - 1
    if first < 1024 or last > 65535:
        raise ConfigError(
            f"vllm_base_port={first} would need the ports {first} to {last}, but engines can use 1024 to 65535 only. "
            "Choose one in that range, or unset it for free ports."
        )


def extra_args_are_free(config: GRPOConfig) -> None:
    """Refuse flags of `vllm serve` that Shoal sets itself."""
    assert config.vllm_extra_args is None or isinstance(config.vllm_extra_args, dict), "parsed before the rules"
    for written in config.vllm_extra_args or {}:
        flag = str(written).lstrip("-").replace("-", "_")
        if flag in _SERVE_FLAGS:
            own = _SERVE_FLAGS[flag]
            instead = f"Set {own} instead" if own else "Remove it"
            raise ConfigError(f"vllm_extra_args has {written!r}, which Shoal sets for every engine itself. {instead}.")


def printing_is_on(config: GRPOConfig) -> None:
    """Refuse a number of completions to print where none are."""
    if config.num_completions_to_print is not None and config.num_completions_to_print < 0:
        raise ConfigError(
            f"num_completions_to_print={config.num_completions_to_print} is negative. Set 0 to print none, or a number."
        )
    if config.num_completions_to_print is not None and not config.log_completions:
        raise ConfigError(
            f"num_completions_to_print={config.num_completions_to_print} has no effect while log_completions is off. "
            "Set log_completions=True, or remove it."
        )


RULES: tuple[Callable[[GRPOConfig], None], ...] = (
    numbers_are_not_text,
    refuse_trl_only,
    transformers_settings_fit,
    counts_are_positive,
    blocks_are_treated_one_way,
    timeouts_are_positive,
    values_are_known,
    groups_can_be_compared,
    engines_generate,
    temperatures_fit,
    filters_leave_tokens,
    clipping_leaves_room,
    correction_bounds_fit,
    nothing_is_corrected_twice,
    skipped_completions_teach_nothing,
    weights_are_numbers,
    workers_can_be_counted,
    engine_settings_fit,
    offloading_has_a_purpose,
    ports_exist,
    extra_args_are_free,
    attached_engines_are_made_elsewhere,
    ray_decides_where,
    settings_for_elsewhere_are_used,
    printing_is_on,
)
"""Every rule that needs no device, the most basic first: later ones may rely on earlier ones."""


def _is_union(hint: object) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
