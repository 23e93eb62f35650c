"""`GRPOConfig`: every setting of a run. Names are TRL's wherever the meaning is TRL's."""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field, it is not a shared mutable default.

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from shoal.config.batch import BATCH_RULES
from shoal.config.elsewhere import TRL_SERVER_HOST, TRL_SERVER_PORT, translate_trl_server
from shoal.config.normalize import parse_json_settings, translate_trl_values
from shoal.config.rules import RULES
from shoal.config.setting import setting
from shoal.config.trl_only import TrlOnlyFields

_DEDICATED_MEMORY = 0.9
_SHARED_MEMORY = 0.3  # TRL's default for an engine beside a trainer.
_SHARED_MEMORY_IF_ASLEEP = 0.6


@dataclass
class GRPOConfig(TrlOnlyFields, TrainingArguments):  # type: ignore[misc]  # transformers is not typed
    """The settings of a GRPO run: transformers' `TrainingArguments`, TRL's GRPO settings, and those of the engines.

    `per_device_train_batch_size` counts completions, as in TRL: one optimizer step trains on
    `per_device_train_batch_size * world_size * gradient_accumulation_steps` of them, `num_generations` for each prompt.

    Defaults that differ from `TrainingArguments` as they do in TRL: `learning_rate`, `logging_steps`,
    `gradient_checkpointing`, `bf16`, `remove_unused_columns`. Unlike in TRL, `bf16` is on by default only where a GPU
    can do it: CPUs without native bfloat16 are slower with it than in float32, and transformers refuses it there.

    Raises:
        ConfigError: A setting or a combination of settings cannot work.
    """

    learning_rate: float = setting(1e-6, "Peak learning rate of the optimizer.")
    logging_steps: float = setting(10, "Log every so many steps; below 1, a share of all steps.")
    gradient_checkpointing: bool = setting(True, "Recompute activations in the backward pass to save memory.")
    bf16: bool | None = setting(None, "Train in bfloat16 mixed precision. Unset: yes on GPUs that can, unless fp16 is.")
    remove_unused_columns: bool = setting(False, "Must stay off: rewards are handed the dataset's other columns.")

    # Model
    model_init_kwargs: dict[str, Any] | str | None = setting(None, "Arguments for from_pretrained, as JSON.")
    trust_remote_code: bool = setting(False, "Run Python code that comes with a model or tokenizer.")
    disable_dropout: bool = setting(False, "Turn the model's dropout off.")

    # Data and generation
    num_generations: int = setting(8, "Completions for each prompt; they are compared with one another.")
    num_generations_eval: int | None = setting(None, "The same in evaluation. Unset: num_generations.")
    max_completion_length: int = setting(512, "Most tokens of a completion.")
    shuffle_dataset: bool = setting(True, "Take prompts in random order, fixed by data_seed or seed.")
    temperature: float = setting(1.0, "Sampling temperature, for engines and for the trainer's logprobs.")
    top_p: float = setting(1.0, "Sample from the most likely tokens that together reach this probability; 1: from all.")
    top_k: int | None = setting(0, "Sample from the so many most likely tokens; 0: from all.")
    min_p: float | None = setting(
        None, "Sample from tokens of at least this share of the most likely one's probability. Unset: from all."
    )
    eval_temperature: float | None = setting(None, "Temperature in evaluation. Unset: temperature; 0: greedy.")
    chat_template_kwargs: dict[str, Any] | str | None = setting(None, "Arguments for the chat template, as JSON.")
    generation_batch_size: int | None = setting(
        None, "Completions written at once, over all processes. Unset: those of one optimizer step."
    )
    steps_per_generation: int | None = setting(
        None, "The same in micro-steps, a multiple of gradient_accumulation_steps, its default."
    )
    num_iterations: int = setting(1, "How many times each batch of completions is trained on.")

    # Loss
    loss_type: str = setting("dapo", "How token losses are averaged: dapo or grpo.")
    beta: float = setting(0.0, "Weight of the KL term to the reference model; 0: no reference model is loaded.")
    epsilon: float = setting(0.2, "How far the ratio may fall below 1 before it is clipped.")
    epsilon_high: float | None = setting(None, "How far it may rise above 1. Unset: epsilon.")
    delta: float | None = setting(
        None, "Upper bound of the ratio where the advantage is negative (two-sided clipping)."
    )
    importance_sampling_level: str = setting("token", "One ratio for each token, or for each sequence.")
    reward_weights: list[float] | None = setting(None, "One weight for each reward function. Unset: 1 for each.")
    multi_objective_aggregation: str = setting(
        "sum_then_normalize", "How rewards are joined: sum_then_normalize or normalize_then_sum."
    )
    scale_rewards: str = setting("group", "Divide by the standard deviation of the group, of the batch, or none.")
    mask_truncated_completions: bool = setting(
        False, "Leave completions that reached the length limit out of the loss."
    )
    use_bias_correction_kl: bool = setting(True, "Multiply the KL term by the importance ratio.")
    vllm_importance_sampling_correction: bool = setting(
        True, "Correct for the gap between the engines' and the trainer's logprobs."
    )
    vllm_importance_sampling_mode: str = setting(
        "sequence_mask", "How: token_truncate, token_mask, sequence_truncate or sequence_mask."
    )
    vllm_importance_sampling_clip_max: float | None = setting(3.0, "Upper bound of the correcting ratio.")
    vllm_importance_sampling_clip_min: float | None = setting(None, "Lower bound of the correcting ratio.")
    old_logprobs: str = setting(
        "policy", "The ratio's old logprobs: the policy's own, or rollout: the engines', with no correction besides."
    )
    skip_zero_advantages: bool | None = setting(
        None,
        "Run no forward pass over completions whose advantage is exactly 0; metrics of the policy then are over the "
        "others. Unset: where beta is 0.",
    )
    fused_logprobs: bool | None = setting(
        None, "Compute logprobs from hidden states, without logits. Unset: where the model's head allows it."
    )
    max_tokens_per_micro_batch: int | None = setting(
        None,
        "Most tokens of a packed forward pass. Unset: what fits the GPU's free memory; on CPUs, "
        "per_device_train_batch_size sequences of full length.",
    )
    recompute_num_layers: int | None = setting(
        None,
        "With gradient_checkpointing, blocks that are computed again in the backward pass. Unset: on GPUs as many as "
        "memory asks for, by estimate first and then by what passes took; on CPUs all.",
    )
    regional_compilation: bool | None = setting(
        None,
        "torch.compile each block of the model by itself. Unset: on GPUs, for dense models that are neither quantised "
        "nor held by DeepSpeed.",
    )

    # Engines
    use_vllm: bool | None = setting(None, "For scripts from TRL: completions are always written by vLLM engines.")
    vllm_mode: str | None = setting(None, "For scripts from TRL: colocate is vllm_devices=colocate; server is auto.")
    vllm_server_base_url: str | None = setting(None, "For scripts from TRL: the one of vllm_server_base_urls.")
    vllm_server_host: str = setting(TRL_SERVER_HOST, "For scripts from TRL: its host.")
    vllm_server_port: int = setting(TRL_SERVER_PORT, "For scripts from TRL: its port.")
    vllm_server_base_urls: list[str] | None = setting(
        None, "URLs of engines that others have started, with shoal serve: attach to these and start none."
    )
    vllm_api_key_file: str | None = setting(
        None, "File with their key, mode 600. Unset: SHOAL_ENGINE_API_KEY of the environment."
    )
    vllm_launcher: str = setting("local", "Where engines are started: local, this host; ray, nodes of a Ray cluster.")
    vllm_devices: str = setting(
        "auto", "GPUs for engines: auto (those the trainer leaves), colocate, cuda:2,cuda:3, 4-7, cpu, or cpu:2."
    )
    vllm_tensor_parallel_size: int = setting(1, "Devices that each layer of an engine is split over.")
    vllm_pipeline_parallel_size: int = setting(1, "Stages that the layers of an engine are split into.")
    vllm_num_engines: int | None = setting(None, "Engines to start. Unset: as many as fit; on CPUs, up to two.")
    vllm_gpu_memory_utilization: float | None = setting(
        None, "Share of a GPU's memory an engine takes. Unset: 0.9; beside a trainer 0.6 if it sleeps, or else 0.3."
    )
    vllm_enable_sleep_mode: bool | None = setting(
        None, "Engines on trainers' GPUs give their memory back while the trainer works. Unset: yes, where there are."
    )
    offload_optimizer_during_rollout: bool = setting(
        False, "Move the optimizer's states to host memory while engines that sleep are awake."
    )
    vllm_max_model_length: int | None = setting(None, "Context of the engines, in tokens. Unset: the model's own.")
    vllm_model_impl: str = setting("vllm", "Model code that engines use: vllm or transformers.")
    vllm_dtype: str | None = setting(None, "Type of the engines' weights. Unset: what the trainer computes in.")
    vllm_base_port: int | None = setting(None, "Engine i listens on this port plus i. Unset: free ports.")
    vllm_extra_args: dict[str, Any] | str | None = setting(None, "Further flags of vllm serve, as JSON.")
    vllm_startup_timeout_s: float = setting(600.0, "Seconds an engine may take to become ready.")
    vllm_request_timeout_s: float = setting(1800.0, "Seconds an engine may take to write one completion.")
    vllm_stall_timeout_s: float = setting(
        120.0, "Seconds an engine with work may write nothing, or not answer, before others get its work."
    )
    vllm_max_restarts: int = setting(
        3,
        "Attempts in a row to restart an engine that died or stalled before the run goes on without it; 0 for none. "
        "Engines that sleep while the trainer works are not restarted.",
    )
    weight_sync_timeout_s: float = setting(120.0, "Seconds an engine may take for any step of a publish of weights.")
    weight_sync_host: str | None = setting(
        None, "Address of this host at which engines elsewhere reach it. Unset: the one on the way to each."
    )
    vllm_lora_sync: str = setting(
        "merge", "How an adapter reaches engines: merge it into the weights sent, or adapter: engines serve it."
    )
    weight_sync_backend: str = setting(
        "auto",
        "Carries weights between GPUs: ipc (engines open the trainer's memory), nccl, or auto: ipc where it can.",
    )
    weight_sync_verify: str = setting(
        "digest", "Proof of every publish: digest, full (bit for bit, for finding faults) or off."
    )

    # Rewards
    reward_timeout_s: float = setting(600.0, "Seconds a reward function may take for one group of completions.")
    reward_on_error: str = setting(
        "raise", "When a reward function fails: raise, or drop (the samples it failed on are not trained on)."
    )
    reward_workers: int = setting(0, "Processes that call synchronous reward functions; 0: threads of the trainer.")
    reward_preflight: bool = setting(True, "Try every reward function on one made-up completion before training.")

    # Logging
    log_completions: bool = setting(False, "Print and keep sample completions every logging_steps.")
    num_completions_to_print: int | None = setting(None, "How many of them to print; 0: none. Unset: all.")

    def __post_init__(self) -> None:
        """Check the settings: first those that need no device, then transformers' own, then the batch."""
        parse_json_settings(self)
        translate_trl_server(self)
        translate_trl_values(self)
        for rule in RULES:
            rule(self)
        if self.bf16 is None:
            # `accelerate launch` hands its mixed_precision over so; "no" is also what it says if nobody chose.
            if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
                self.fp16 = True
            self.bf16 = not self.fp16 and not _trains_on_cpu(self) and is_torch_bf16_gpu_available()
        super().__post_init__()
        # One process trains on one GPU. Without this, a plain `python train.py` would wrap the model in
        # nn.DataParallel over every GPU it sees, those of the engines too.
        self._n_gpu = min(self.n_gpu, 1)
        for rule in BATCH_RULES:
            rule(self)

    @property
    def completions_per_step(self) -> int:
        """Completions that one optimizer step trains on, over all processes."""
        return int(self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps)

    @property
    def parts_per_batch(self) -> int:
        """Optimizer steps that it takes to go once through the completions written at once."""
        if self.generation_batch_size is not None:
            return int(self.generation_batch_size) // self.completions_per_step
        micro_steps: int = self.gradient_accumulation_steps
        return (self.steps_per_generation or micro_steps) // micro_steps

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps that train on the completions written at once."""
        return self.parts_per_batch * self.num_iterations

    @property
    def prompts_per_batch(self) -> int:
        """Prompts whose completions are written at once, over all processes."""
        return int(self.completions_per_step * self.parts_per_batch // self.num_generations)

    @property
    def engines_are_elsewhere(self) -> bool:
        """Whether engines use no devices of this host that are reserved for them."""
        return self.vllm_server_base_urls is not None or self.vllm_launcher != "local"

    def engine_memory_utilization(self, *, colocated: bool) -> float:
        """Return the share of a GPU's memory that an engine takes.

        An engine that never sleeps must fit beside everything that training takes, activations too: 0.3, as in TRL. One
        that sleeps meets only what the trainer keeps meanwhile: its weights and optimizer states (12 bytes a parameter
        for AdamW on float32 weights, 4 with `offload_optimizer_during_rollout`, and 4 more for DDP's buckets), since
        gradients are freed and the cache of the allocator is given back. 0.6 leaves the trainer 0.4, less the two
        processes' CUDA contexts (about 2 GB): 30 GB of 80, which is AdamW on 2.5 billion parameters, or on 7 billion
        with the states offloaded. vLLM refuses to start where its share is not free, and says so.

        Args:
            colocated: Whether a trainer process uses the GPU too.
        """
        if self.vllm_gpu_memory_utilization is not None:
            return self.vllm_gpu_memory_utilization
        if not colocated:
            return _DEDICATED_MEMORY
        return _SHARED_MEMORY if self.vllm_enable_sleep_mode is False else _SHARED_MEMORY_IF_ASLEEP


def _trains_on_cpu(config: GRPOConfig) -> bool:
    return bool(config.use_cpu) or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
