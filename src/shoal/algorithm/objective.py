"""Put a micro-batch's logprobs together into its share of the step's loss, and what is logged about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from shoal.algorithm.kl import token_kl
from shoal.algorithm.losses import LOSSES, LossSettings, TokenLoss
from shoal.algorithm.metrics import ObjectiveMetrics, masked_max, masked_min, masked_sum
from shoal.algorithm.ratios import CorrectionMode, RolloutCorrection, rollout_correction
from shoal.errors import ConfigError
from shoal.types import MicroBatch

OldFrom: TypeAlias = Literal["policy", "rollout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionSettings:
    """How the difference between engine and trainer is corrected; see `rollout_correction`.

    Attributes:
        mode: TRL's `vllm_importance_sampling_mode`.
        clip_min: TRL's `vllm_importance_sampling_clip_min`.
        clip_max: TRL's `vllm_importance_sampling_clip_max`.
    """

    mode: CorrectionMode
    clip_min: float | None
    clip_max: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSettings:
    """Everything about the loss that the user chooses.

    Attributes:
        loss_type: A key of `LOSSES`.
        loss: The clipping bounds.
        beta: Weight of the KL term; 0 for none.
        use_bias_correction_kl: Whether the KL term is multiplied by the importance ratio.
        correction: How engine and trainer are reconciled; None for not at all.
        old_from: Whose logprobs the ratio is taken against where none are given: the policy's own, or the engine's.
            The latter holds the whole way from engine to policy within the clipping range, so a correction for the
            engine's part of it would count that twice.
    """

    loss_type: str
    loss: LossSettings
    beta: float
    use_bias_correction_kl: bool
    correction: CorrectionSettings | None
    old_from: OldFrom = "policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One micro-batch's part of the objective.

    Attributes:
        loss: 0-d, with gradient: its share of the step's loss, to be summed (never averaged) over micro-batches and
            ranks.
        metrics: What is logged, without gradient.
    """

    loss: torch.Tensor
    metrics: ObjectiveMetrics


def grpo_objective(
    micro_batch: MicroBatch,
    policy_logprobs: torch.Tensor,
    *,
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    settings: ObjectiveSettings,
    entropy: torch.Tensor | None = None,
) -> Objective:
    """Compute `sum_n loss_weights[n] * (correction_ratio[n] * token_loss[n] + beta * kl[n])`.

    A token with weight 0 has no influence at all, whatever its logprobs are (also infinite or NaN).

    Args:
        micro_batch: The micro-batch.
        policy_logprobs: `[N]`, with gradient.
        old_logprobs: `[N]`, the trainer's before any update on this step's rollouts; None when there was no update
            yet, so that they are the policy's, and when they are the engine's.
        ref_logprobs: `[N]`, the reference model's; needed exactly when `beta` is not 0.
        settings: The user's choices.
        entropy: `[N]`, for the log only.

    Raises:
        ConfigError: There is no such loss, or the settings contradict one another or what is given.
    """
    _check(settings, ref_logprobs, old_logprobs)
    in_loss = micro_batch.loss_weights != 0
    # Multiplying by a weight of 0 would turn an infinite loss into NaN, so such tokens are neutralised first.
    policy = torch.where(in_loss, policy_logprobs, 0.0)
    rollout = torch.where(in_loss, micro_batch.rollout_logprobs, 0.0)
    trainer = policy.detach() if old_logprobs is None else torch.where(in_loss, old_logprobs.detach(), 0.0)
    old = trainer
    if settings.old_from == "rollout":
        old = torch.where(torch.isnan(rollout), trainer, rollout)  # without an engine's logprob: as if they agreed

    tokens = LOSSES[settings.loss_type].token_loss(
        policy, old, micro_batch.advantages, micro_batch.sequence_index, micro_batch.num_sequences, settings.loss
    )
    token_loss = tokens.token_loss
    correction = None
    if settings.correction is not None:
        correction = rollout_correction(
            old,
            rollout,
            micro_batch.sequence_index,
            micro_batch.num_sequences,
            mode=settings.correction.mode,
            clip_min=settings.correction.clip_min,
            clip_max=settings.correction.clip_max,
        )
        token_loss = token_loss * correction.ratio
    kl = None
    if ref_logprobs is not None:
        ref = torch.where(in_loss, ref_logprobs.detach(), 0.0)
        kl = token_kl(policy, ref, tokens.ratio if settings.use_bias_correction_kl else None)
        token_loss = token_loss + settings.beta * kl

    return Objective(
        loss=(micro_batch.loss_weights * token_loss).sum(),
        metrics=_metrics(micro_batch, settings, tokens, trainer - rollout, correction, kl, entropy),
    )


def _check(settings: ObjectiveSettings, ref_logprobs: torch.Tensor | None, old_logprobs: torch.Tensor | None) -> None:
    """Raise for settings that would fail later, or be ignored."""
    if settings.loss_type not in LOSSES:
        raise ConfigError(f"loss_type={settings.loss_type!r} is not a loss. Use one of {', '.join(sorted(LOSSES))}.")
    if (settings.beta != 0) != (ref_logprobs is not None):
        given = "were not given" if ref_logprobs is None else "were given"
        raise ConfigError(
            f"beta={settings.beta}, but the reference model's logprobs {given}. The KL term needs both: pass "
            "ref_logprobs exactly when beta is not 0."
        )
    if settings.old_from == "rollout" and (settings.correction is not None or old_logprobs is not None):
        raise ConfigError(
            'old_logprobs="rollout" takes the ratio against the engine, so there is nothing to correct and no other '
            "old policy. Turn the correction off and pass no old_logprobs."
        )


def _metrics(
    micro_batch: MicroBatch,
    settings: ObjectiveSettings,
    tokens: TokenLoss,
    difference: torch.Tensor,
    correction: RolloutCorrection | None,
    kl: torch.Tensor | None,
    entropy: torch.Tensor | None,
) -> ObjectiveMetrics:
    """Take the sums and extremes over the tokens in the loss. `difference` is trainer - engine, `[N]`."""
    in_loss = micro_batch.loss_weights != 0
    one_each = in_loss & _first_of_sequence(micro_batch.sequence_index)
    nowhere = torch.zeros_like(in_loss)
    unused = torch.zeros_like(difference)

    clip_mask = one_each if settings.loss.importance_sampling_level == "sequence" else in_loss
    known = in_loss & ~torch.isnan(difference)
    ratio, ratio_mask = unused, nowhere
    if correction is not None and settings.correction is not None:
        ratio = correction.ratio
        ratio_mask = one_each if settings.correction.mode.startswith("sequence") else in_loss
    kl_mask = nowhere if kl is None else in_loss
    entropy_mask = nowhere if entropy is None else in_loss
    return ObjectiveMetrics(
        entropy_sum=masked_sum(unused if entropy is None else entropy, entropy_mask),
        num_entropies=entropy_mask.sum().double(),
        kl_sum=masked_sum(unused if kl is None else kl, kl_mask),
        num_kls=kl_mask.sum().double(),
        clip_low_sum=masked_sum(tokens.clipped_low, clip_mask),
        clip_high_sum=masked_sum(tokens.clipped_high, clip_mask),
        num_clips=clip_mask.sum().double(),
        logprob_difference_sum=masked_sum(difference.abs(), known),
        logprob_difference_max=masked_max(difference.abs(), known),
        num_logprob_differences=known.sum().double(),
        ratio_sum=masked_sum(ratio, ratio_mask),
        ratio_min=masked_min(ratio, ratio_mask),
        ratio_max=masked_max(ratio, ratio_mask),
        num_ratios=ratio_mask.sum().double(),
    )


def _first_of_sequence(sequence_index: torch.Tensor) -> torch.Tensor:
    """Mark the first token of each sequence, `[N]` bool; the tokens of a sequence lie together."""
    first = torch.ones_like(sequence_index, dtype=torch.bool)
    first[1:] = sequence_index[1:] != sequence_index[:-1]
    return first
