"""Which tokens truncated sampling (top-k, top-p, min-p) leaves, as bounds on a row's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """What an engine cuts off before it samples, in vLLM's names.

    Attributes:
        top_k: Keep the so many most likely tokens; 0 for all.
        top_p: Of those, keep the most likely ones that together reach this probability; 1 for all.
        min_p: First of all, keep those of at least this share of the most likely token's probability; 0 for all.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def is_off(self) -> bool:
        """Whether every token stays."""
        return self.top_k <= 0 and self.top_p >= 1 and self.min_p <= 0


@dataclass(frozen=True, slots=True)
class Support:
    """What is left of each row, as numbers that its logits are compared with.

    Attributes:
        low: `[R]`, logits up to this are cut off; -inf for none.
        high: `[R]`, logits above `low` and up to this are tied for the last places.
        log_share: `[R]`, log of the share of the tied that has a place, but for the sampled token, which has one.
    """

    low: torch.Tensor
    high: torch.Tensor
    log_share: torch.Tensor

    def rows(self, rows: slice) -> Support:
        """Return some rows."""
        return Support(self.low[rows], self.high[rows], self.log_share[rows])


def find_support(logits: torch.Tensor, target_ids: torch.Tensor, truncation: Truncation) -> Support:
    """Find what truncated sampling leaves of each row.

    The order is vLLM's (`Sampler.sample` and `apply_top_k_top_p` in vllm/v1/sample, 0.26 to 0.33): temperature, min-p,
    top-k, then top-p over what is left, renormalised.

    16-bit logits are often equal, also at the last place. vLLM then keeps as many of the equal ones as there are
    places, and which of them is chance. Giving each its share of the places keeps the sum that logprobs are normalised
    by; keeping all would make every such logprob too small.

    The bounds lie half-way to the nearest other logit, so that logits which are computed again, in another order of
    summation, fall on the same side.

    Args:
        logits: `[R, V]`, after temperature, whole rows.
        target_ids: `[R]` int64, the sampled tokens.
        truncation: Not off.
    """
    last, num_left = _last_left(logits, truncation)
    tied = logits == last[:, None]
    larger = logits.masked_fill(logits <= last[:, None], torch.inf).amin(dim=-1)
    below = logits.masked_fill(logits >= last[:, None], -torch.inf).amax(dim=-1)
    sampled_is_tied = tied.gather(1, target_ids[:, None]).squeeze(1).long()
    places = num_left - (logits > last[:, None]).sum(dim=-1) - sampled_is_tied
    share = (places / (tied.sum(dim=-1) - sampled_is_tied).clamp(min=1)).to(logits.dtype)
    middle, upper = (last + below) / 2, (last + larger) / 2
    return Support(
        low=torch.where(middle < last, middle, below),
        high=torch.where(upper < larger, upper, last),
        log_share=share.clamp(0, 1).log(),
    )


def cut_(logits: torch.Tensor, support: Support, sampled_columns: torch.Tensor, is_here: torch.Tensor) -> None:
    """Leave of the logits what the support says, in place: -inf for what is cut off. The sampled token stays.

    The engine has sampled that token, so it was in the engine's set; where rounding puts it just outside of the
    trainer's, a logprob of -inf would be the wrong answer.

    Args:
        logits: `[R, C]`, some columns of the vocabulary.
        support: Of these rows.
        sampled_columns: `[R]` int64 in `[0, C)`, each row's sampled token.
        is_here: `[R]` bool, whether it is among these columns.
    """
    columns = sampled_columns[:, None]
    sampled = logits.gather(1, columns)
    cut = logits <= support.low[:, None]
    logits.add_(torch.where(logits <= support.high[:, None], support.log_share[:, None], 0.0))
    logits.masked_fill_(cut, -torch.inf)
    logits.scatter_(1, columns, torch.where(is_here[:, None], sampled, logits.gather(1, columns)))


def _last_left(logits: torch.Tensor, truncation: Truncation) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest logit that is left in each row, and how many are, both `[R]`."""
    vocabulary = logits.shape[1]
    best = logits.amax(dim=-1)
    num_left = torch.full_like(best, vocabulary, dtype=torch.long)
    likely = logits
    if truncation.min_p > 0:
        is_likely = logits >= (best + math.log(truncation.min_p))[:, None]
        num_left = is_likely.sum(dim=-1)
        likely = logits.masked_fill(~is_likely, torch.inf)
    if 0 < truncation.top_k < vocabulary:
        num_left = num_left.clamp(max=truncation.top_k)
        ordered = logits.topk(truncation.top_k, dim=-1).values
    elif truncation.top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
    else:
        return likely.amin(dim=-1), num_left
    if truncation.top_p < 1:
        is_left = torch.arange(ordered.shape[1], device=logits.device) < num_left[:, None]
        mass = torch.where(is_left, (ordered - best[:, None]).exp(), 0.0)
        # A token stays while those before it have not reached top_p yet; the first one always does.
        reached = mass.cumsum(dim=-1) - mass >= truncation.top_p * mass.sum(dim=-1, keepdim=True)
        num_left = (is_left & ~reached).sum(dim=-1).clamp(min=1)
    return ordered.gather(1, num_left[:, None] - 1).squeeze(1), num_left
