"""From a step's scored groups to training sequences, and to the numbers that are logged about them."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, replace

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
    """Compute the advantages of a step.

    A sample that a reward function failed on takes no part: it is in no mean and no standard deviation, neither its
    group's nor (`scale_rewards="batch"`, `normalize_then_sum`) the step's, and its advantage is 0.
    """
    rewards = np.stack([group.rewards for group in groups])
    dropped = np.stack([group.dropped for group in groups])
    return JudgedStep(
        groups=tuple(groups),
        advantages=compute_advantages(
            np.where(dropped[..., None], np.nan, rewards),
            np.asarray(weights, dtype=np.float64),
            scale_rewards=args.scale_rewards,  # type: ignore[arg-type]
            multi_objective_aggregation=args.multi_objective_aggregation,  # type: ignore[arg-type]
        ),
    )


def training_sequences(step: JudgedStep, args: GRPOConfig) -> list[Sequence]:
    """Return every completion of the step as a training sequence, but for those that a reward function failed on.

    The step is then what it would be had those never been written: the loss's denominator, tokens (dapo) or sequences
    (grpo) of the step, counts the others only, and so nothing else about their gradients changes. If none is left, the
    shortest completion is returned out of the loss, since every rank must have something to run.
    """
    sequences = [
        Sequence(
            token_ids=np.concatenate(
                [np.asarray(group.prompt.token_ids, np.int64), rollout.token_ids.astype(np.int64)]
            ),
            prompt_length=len(group.prompt.token_ids),
            advantage=float(step.advantages.advantages[row, sample]),
            rollout_logprobs=rollout.rollout_logprobs,
            in_loss=not (args.mask_truncated_completions and rollout.finish_reason == "length"),
            by_policy=rollout.by_policy,
        )
        for row, group in enumerate(step.groups)
        for sample, rollout in enumerate(group.rollouts)
    ]
    dropped = [is_dropped for group in step.groups for is_dropped in group.dropped]
    if all(dropped):
        return [replace(min(sequences, key=lambda sequence: len(sequence.token_ids)), in_loss=False)]
    return [sequence for sequence, is_dropped in zip(sequences, dropped, strict=True) if not is_dropped]


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
        "frac_reward_zero_std": _mean(np.where(_is_dropped(step.groups), np.nan, step.advantages.zero_std)),
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


def failure_metrics(groups: abc.Sequence[ScoredGroup], reward_names: abc.Sequence[str]) -> dict[str, float]:
    """Count what reward functions failed on.

    Returns:
        For each function, calls that failed (`rewards/NAME/errors`) and those of them that did not end in time
        (`rewards/NAME/timeouts`); then the samples that are left out, and the groups of which nothing is left.
    """
    metrics = {f"rewards/{name}/{kind}": 0.0 for name in reward_names for kind in ("errors", "timeouts")}
    for failure in (failure for group in groups for failure in group.failures):
        metrics[f"rewards/{failure.function}/errors"] += 1
        metrics[f"rewards/{failure.function}/timeouts"] += failure.kind == "timeout"
    return metrics | {
        "rollout/dropped_samples": float(sum(group.dropped.sum() for group in groups)),
        "rollout/dropped_groups": float(_is_dropped(groups).sum()),
    }


def num_tokens(groups: abc.Sequence[ScoredGroup]) -> int:
    """Count the prompt and completion tokens of all sequences, prompts once for each completion as TRL does."""
    return sum(len(group.prompt.token_ids) + len(rollout.token_ids) for group in groups for rollout in group.rollouts)


def speed_metrics(groups: abc.Sequence[ScoredGroup], seconds: float) -> dict[str, float]:
    """Return how long the groups took to be written and rewarded, and how many completion tokens a second that is."""
    num_completion_tokens = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
    return {"seconds/generate": seconds, "rollout/tokens_per_s": num_completion_tokens / seconds}


def merge_logged(logged: abc.Sequence[tuple[str, float]]) -> dict[str, float]:
    """Average what reward functions logged with `log_metric`, by name."""
    values: dict[str, list[float]] = {}
    for name, value in logged:
        values.setdefault(name, []).append(value)
    return {name: float(np.mean(items)) for name, items in values.items()}


def _is_dropped(groups: abc.Sequence[ScoredGroup]) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Say of each group whether nothing of it is left, `[P]`."""
    return np.array([group.dropped.all() for group in groups], dtype=np.bool_)


def _mean(values: abc.Sequence[float] | np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    known = np.asarray(values)[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _std(values: abc.Sequence[float] | np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    known = np.asarray(values)[~np.isnan(values)]
    return float(known.std(ddof=1)) if known.size > 1 else 0.0
