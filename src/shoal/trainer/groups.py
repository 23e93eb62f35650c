"""From a step's scored groups to training sequences, and to the numbers that are logged about them."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import numpy as np

from shoal.algorithm.advantages import Advantages, compute_advantages
from shoal.config import GRPOConfig
from shoal.types import ScoredGroup, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedStep:
    """A step's groups with their advantages.

    Attributes:
        groups: P groups of K completions.
        advantages: `[P, K]`, with the weighted rewards.
    """

    groups: tuple[ScoredGroup, ...]
    advantages: Advantages


def judge(groups: abc.Sequence[ScoredGroup], weights: abc.Sequence[float], args: GRPOConfig) -> JudgedStep:
    """Compute the advantages of a step."""
    return JudgedStep(
        groups=tuple(groups),
        advantages=compute_advantages(
            np.stack([group.rewards for group in groups]),
            np.asarray(weights, dtype=np.float64),
            scale_rewards=args.scale_rewards,  # type: ignore[arg-type]
            multi_objective_aggregation=args.multi_objective_aggregation,  # type: ignore[arg-type]
        ),
    )


def training_sequences(step: JudgedStep, args: GRPOConfig) -> list[Sequence]:
    """Return every completion of the step as a training sequence."""
    return [
        Sequence(
            token_ids=np.concatenate(
                [np.asarray(group.prompt.token_ids, np.int64), rollout.token_ids.astype(np.int64)]
            ),
            prompt_length=len(group.prompt.token_ids),
            advantage=float(step.advantages.advantages[row, sample]),
            rollout_logprobs=rollout.rollout_logprobs,
            in_loss=not (args.mask_truncated_completions and rollout.finish_reason == "length"),
        )
        for row, group in enumerate(step.groups)
        for sample, rollout in enumerate(group.rollouts)
    ]


def group_metrics(step: JudgedStep, reward_names: abc.Sequence[str]) -> dict[str, float]:
    """Return a step's metrics under TRL's names. Lengths are in tokens."""
    rewards = np.stack([group.rewards for group in step.groups])
    rollouts = [rollout for group in step.groups for rollout in group.rollouts]
    lengths = np.array([len(rollout.token_ids) for rollout in rollouts], dtype=np.float64)
    ended = np.array([rollout.finish_reason == "stop" for rollout in rollouts])
    terminated = lengths[ended] if ended.any() else np.zeros(1)
    metrics: dict[str, float] = {
        "reward": _mean(step.advantages.rewards),
        "reward_std": _std(step.advantages.rewards),
        "frac_reward_zero_std": float(step.advantages.zero_std.mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1.0 - ended.mean()),
        "completions/mean_terminated_length": float(terminated.mean()),
        "completions/min_terminated_length": float(terminated.min()),
        "completions/max_terminated_length": float(terminated.max()),
    }
    for index, name in enumerate(reward_names):
        metrics[f"rewards/{name}/mean"] = _mean(rewards[..., index])
        metrics[f"rewards/{name}/std"] = _std(rewards[..., index])
    return metrics


def num_tokens(groups: abc.Sequence[ScoredGroup]) -> int:
    """Count the prompt and completion tokens of all sequences, prompts once for each completion as TRL does."""
    return sum(len(group.prompt.token_ids) + len(rollout.token_ids) for group in groups for rollout in group.rollouts)


def merge_logged(logged: abc.Sequence[tuple[str, float]]) -> dict[str, float]:
    """Average what reward functions logged with `log_metric`, by name."""
    values: dict[str, list[float]] = {}
    for name, value in logged:
        values.setdefault(name, []).append(value)
    return {name: float(np.mean(items)) for name, items in values.items()}


def _mean(values: abc.Sequence[float] | np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    known = np.asarray(values)[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _std(values: abc.Sequence[float] | np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    known = np.asarray(values)[~np.isnan(values)]
    return float(known.std(ddof=1)) if known.size > 1 else 0.0
