"""The clipped surrogate of PPO, per token: what GRPO, DAPO and GSPO have in common."""

from __future__ import annotations

import torch

from shoal.algorithm.losses.records import LossSettings, TokenLoss
from shoal.algorithm.ratios import sequence_sums


def clipped_surrogate(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    sequence_index: torch.Tensor,
    num_sequences: int,
    settings: LossSettings,
) -> TokenLoss:
    """Compute `-min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)` for every token.

    Equation 3 of https://arxiv.org/abs/2402.03300, with the asymmetric bounds of https://arxiv.org/abs/2503.14476.

    Args:
        policy_logprobs: `[N]`, with gradient.
        old_logprobs: `[N]`, without gradient.
        advantages: `[N]`.
        sequence_index: `[N]` int64 in `[0, num_sequences)`.
        num_sequences: Number of sequences, S.
        settings: The bounds.
    """
    log_ratio = policy_logprobs - old_logprobs
    if settings.importance_sampling_level == "sequence":
        log_ratio = _sequence_means(log_ratio, sequence_index, num_sequences)
    ratio = log_ratio.exp()
    low, high = 1 - settings.epsilon, 1 + settings.epsilon_high
    bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
    return TokenLoss(
        token_loss=-torch.min(bounded * advantages, ratio.clamp(low, high) * advantages),
        ratio=ratio,
        clipped_low=(ratio < low) & (advantages < 0),
        clipped_high=(ratio > high) & (advantages > 0),
    )


def _sequence_means(values: torch.Tensor, sequence_index: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Replace each token's value by the mean over its sequence, with gradient."""
    lengths = torch.bincount(sequence_index, minlength=num_sequences)
    means = sequence_sums(values, sequence_index, num_sequences) / lengths.clamp(min=1)
    return means[sequence_index]
