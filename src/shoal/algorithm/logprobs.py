"""Turn logits into the logprobs of given tokens and the entropy, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from shoal.algorithm.truncation import Support, Truncation, cut_, find_support
from shoal.errors import ConfigError

MAX_CHUNK_ELEMENTS = 1 << 25
"""Logits taken up at once: 128 MiB in float32, some 200 rows of a 150k vocabulary; larger chunks gain no speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """What a row of logits says about its token.

    Attributes:
        logprobs: `[N]` float32 (float64 for float64 logits), with gradient to the logits.
        entropy: `[N]` of the same type, in nats, without gradient.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor


def token_logprobs(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    temperature: float,
    *,
    truncation: Truncation | None = None,
    max_chunk_elements: int = MAX_CHUNK_ELEMENTS,
) -> TokenLogprobs:
    """Give each target's logprob under `softmax(logits / temperature)`, and that distribution's entropy.

    Computed in float32 whatever the type of the logits (float64 logits stay so), in chunks of rows: no float32 copy of
    all logits ever exists. The backward pass writes one gradient of the logits' own size and type, and nothing else of
    that size.

    Args:
        logits: `[N, V]`, any float type.
        target_ids: `[N]` int64, in `[0, V)`.
        temperature: The temperature that the engines sample with, above 0.
        truncation: What the engines cut off; the set of tokens that stay is a constant for the gradient.
        max_chunk_elements: Bound on rows x V of a chunk (at least one row is taken).

    Raises:
        ConfigError: The temperature is not above 0: a greedy policy has no logprobs to train.
    """
    check_temperature(temperature)
    if truncation is not None and truncation.is_off:
        truncation = None
    logprobs, entropy = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        logits, target_ids, temperature, truncation, max_chunk_elements
    )
    return TokenLogprobs(logprobs=logprobs, entropy=entropy)


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that logits cannot be divided by.

    Raises:
        ConfigError: It is not above 0.
    """
    if not temperature > 0:
        raise ConfigError(
            f"temperature={temperature} leaves no distribution to train: logprobs are those of softmax(logits / "
            "temperature). Set temperature above 0 (1.0 is usual)."
        )


class _ChunkedLogprobs(torch.autograd.Function):
    """The log-softmax at one index per row, with a backward pass that also goes chunk by chunk.

    Checkpointing each chunk would compute the forward pass twice and, as every slice's gradient is padded to the full
    logits, write `[N, V]` once per chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target_ids: torch.Tensor,
        temperature: float,
        truncation: Truncation | None,
        max_chunk_elements: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(len(logits), dtype=dtype, device=logits.device)
        entropy, log_normalizer = torch.empty_like(logprobs), torch.empty_like(logprobs)
        support = None if truncation is None else Support(*(torch.empty_like(logprobs) for _ in range(3)))
        for rows in _row_chunks(logits, max_chunk_elements):
            scaled = logits[rows].to(dtype) / temperature
            if support is not None and truncation is not None:
                found = find_support(scaled, target_ids[rows], truncation)
                support.low[rows], support.high[rows], support.log_share[rows] = found.low, found.high, found.log_share
                cut_(scaled, found, target_ids[rows], _everywhere(target_ids[rows]))
            log_normalizer[rows] = torch.logsumexp(scaled, dim=-1)
            logprobs[rows] = scaled.gather(1, target_ids[rows, None]).squeeze(1) - log_normalizer[rows]
            # entr(p) = -p log p is 0 at p = 0, where p times an infinite logit would be NaN.
            probs = scaled.sub_(log_normalizer[rows, None]).exp_()
            entropy[rows] = torch.special.entr(probs).sum(dim=-1)
        bounds = () if support is None else (support.low, support.high, support.log_share)
        ctx.save_for_backward(logits, target_ids, log_normalizer, *bounds)
        ctx.temperature, ctx.max_chunk_elements = temperature, max_chunk_elements
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, target_ids, log_normalizer, *bounds = ctx.saved_tensors
        support = Support(*bounds) if bounds else None
        grad_logits = torch.empty_like(logits)
        for rows in _row_chunks(logits, ctx.max_chunk_elements):
            # d logprob / d logits = (onehot(target) - softmax) / temperature
            scaled = logits[rows].to(log_normalizer.dtype) / ctx.temperature
            if support is not None:
                cut_(scaled, support.rows(rows), target_ids[rows], _everywhere(target_ids[rows]))
            probs = scaled.sub_(log_normalizer[rows, None]).exp_()
            row_scale = (grad_logprobs[rows] / ctx.temperature)[:, None]
            grad = probs.mul_(-row_scale).scatter_add_(1, target_ids[rows, None], row_scale)
            grad_logits[rows] = grad.to(logits.dtype)
        return grad_logits, None, None, None, None


def _everywhere(target_ids: torch.Tensor) -> torch.Tensor:
    """Mark all rows: each one's target is among the columns, which are the whole vocabulary."""
    return torch.ones_like(target_ids, dtype=torch.bool)


def _row_chunks(logits: torch.Tensor, max_elements: int) -> Iterator[slice]:
    """Cut the rows of `[N, V]` into slices of at most `max_elements` elements, and at least one row."""
    num_rows = max(1, max_elements // max(1, logits.shape[1]))
    for start in range(0, len(logits), num_rows):
        yield slice(start, start + num_rows)
