"""What `GRPOTrainer` is given, checked and loaded before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from shoal.config import GRPOConfig
from shoal.errors import ConfigError
from shoal.placement.records import PlacementPlan
from shoal.trainer.checks import check_disk, longest_prompt
from shoal.trainer.exchange import Exchange
from shoal.trainer.factory import plan_placement
from shoal.trainer.judge import Judge
from shoal.trainer.model import (
    add_adapter,
    context_length,
    load_policy,
    load_tokenizer,
    num_parameter_bytes,
    read_config,
)
from shoal.trainer.run_prompts import RunPrompts


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """What a run works on, and with.

    Attributes:
        exchange: To the other ranks.
        judge: The reward functions.
        plan: Who gets which device.
        prompts: Of training and evaluation.
        tokenizer: The policy's.
        policy: The model, with its adapter if one is trained.
    """

    exchange: Exchange
    judge: Judge
    plan: PlacementPlan
    prompts: RunPrompts
    tokenizer: Any
    policy: nn.Module


def check_inputs(
    model: str | nn.Module,
    reward_funcs: Callable[..., Any] | Sequence[Callable[..., Any]],
    args: GRPOConfig,
    *,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | None,
    tokenizer: Any,
    peft_config: Any,
) -> RunInputs:
    """Check everything that a user has given, what is quick to check first; load the model last. A collective.

    Args:
        model: A folder, a hub id, or a causal language model.
        reward_funcs: One function or several; each is called once.
        args: The settings.
        train_dataset: As the user gave it, or None.
        eval_dataset: The same.
        tokenizer: None for the model's own.
        peft_config: Of the adapter to train; None to train all weights.

    Raises:
        ShoalError: Something cannot work.
    """
    judge = Judge(reward_funcs, args)
    if train_dataset is None:
        raise ConfigError("train_dataset is missing. Pass a datasets.Dataset with a column `prompt`.")
    tokenizer = tokenizer or load_tokenizer(model, args)
    exchange = Exchange(rank=args.process_index, world_size=args.world_size, timeout_s=args.ddp_timeout)
    config = read_config(model, args)
    plan = plan_placement(config, args)
    prompts = RunPrompts(
        train_dataset,
        eval_dataset,
        tokenizer,
        args,
        max_prompt_tokens=longest_prompt(
            context_length(config), args.vllm_max_model_length, args.max_completion_length
        ),
    )
    exchange.json(lambda: judge.check(prompts.first, tokenizer))
    policy = load_policy(model, args)
    if peft_config is not None:
        policy = add_adapter(policy, peft_config, args)
    check_disk(
        Path(args.output_dir),
        model_bytes=num_parameter_bytes(policy),
        saves_optimizer=args.save_strategy != "no" and not args.save_only_model,
    )
    return RunInputs(exchange=exchange, judge=judge, plan=plan, prompts=prompts, tokenizer=tokenizer, policy=policy)
