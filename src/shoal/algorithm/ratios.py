"""Correct for the difference between the engine that wrote the tokens and the trainer that scores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

CorrectionMode: TypeAlias = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutCorrection:
    """The weights that make the engine's samples stand for the trainer's distribution.

    Attributes:
        ratio: `[N]`, trainer / engine after truncation or masking, of the type of the trainer's logprobs (float32 in
            training); of no gradient.
        logprob_difference: `[N]`, trainer - engine before any of that; NaN where the engine gave no logprob.
    """

    ratio: torch.Tensor
    logprob_difference: torch.Tensor


def rollout_correction(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    sequence_index: torch.Tensor,
    num_sequences: int,
    *,
    mode: CorrectionMode,
    clip_min: float | None,
    clip_max: float | None,
) -> RolloutCorrection:
    """Weigh each token by trainer probability / engine probability, kept within bounds.

    The two never agree exactly (kernels, batch shapes, quantisation), and disagree more when the tokens were written by
    older weights. Truncation moves a ratio to the nearest bound (https://fengyao.notion.site/off-policy-rl); masking
    gives a ratio beyond a bound the weight 0. A token's ratio is its own; a sequence's is the product of its tokens'
    and is shared by all of them. A token without an engine logprob (NaN) counts as agreeing.

    Args:
        old_logprobs: `[N]`, the trainer's logprobs with the weights of the rollout.
        rollout_logprobs: `[N]`, the engine's.
        sequence_index: `[N]` int64 in `[0, num_sequences)`.
        num_sequences: Number of sequences, S.
        mode: Whose ratio, and what happens outside the bounds.
        clip_min: Lower bound, or None.
        clip_max: Upper bound, or None.
    """
    difference = old_logprobs.detach() - rollout_logprobs
    log_ratio = torch.where(torch.isnan(difference), 0.0, difference)
    if mode in ("sequence_truncate", "sequence_mask"):
        log_ratio = sequence_sums(log_ratio, sequence_index, num_sequences)[sequence_index]
    ratio = log_ratio.exp()
    if mode in ("token_mask", "sequence_mask"):
        outside = torch.zeros_like(ratio, dtype=torch.bool)
        if clip_min is not None:
            outside = outside | (ratio < clip_min)
        if clip_max is not None:
            outside = outside | (ratio > clip_max)
        ratio = torch.where(outside, 0.0, ratio)
    elif clip_min is not None or clip_max is not None:
        ratio = ratio.clamp(min=clip_min, max=clip_max)
    return RolloutCorrection(ratio=ratio, logprob_difference=difference)


def sequence_sums(values: torch.Tensor, sequence_index: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Sum `[N]` token values by sequence: `[S]`, of the values' type, with gradient.

    Summed in float64: the ratio of a sequence is the exponential of thousands of terms, and on GPUs `index_add` adds
    them in any order, which float32 would show.
    """
    sums = torch.zeros(num_sequences, dtype=torch.float64, device=values.device)
    return sums.index_add(0, sequence_index, values.double()).to(values.dtype)
