"""Which tokens truncated sampling (top-k, top-p, min-p) leaves, as one bound on a row's logits."""

from __future__ import annotations

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


def support_bounds(logits: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    """Return, for each row, a bound that the logits of exactly the remaining tokens exceed: `[R]`, -inf for all.

    The order is vLLM's (`Sampler.sample` and `apply_top_k_top_p` in vllm/v1/sample, 0.26 to 0.33): temperature, min-p,
    top-k, then top-p over what is left, renormalised. Tokens with the very logit of the last one that stays do so too;
    vLLM does the same for top-k, and for top-p leaves their order to its sort.

    The bound lies half-way to the best token that is cut, so that logits which are computed again, in another order of
    summation, fall on the same side.

    Args:
        logits: `[R, V]`, after temperature, whole rows.
        truncation: Not off.
    """
    smallest = logits.new_full((len(logits),), -torch.inf)
    num_candidates = logits.shape[1]
    best = logits.amax(dim=-1)
    if truncation.min_p > 0:
        smallest = best + torch.log(best.new_tensor(truncation.min_p))
    if 0 < truncation.top_k < logits.shape[1]:
        num_candidates = truncation.top_k
        # The smallest of the k largest; also the candidates of top-p below.
        candidates = logits.topk(num_candidates, dim=-1).values
        smallest = torch.maximum(smallest, candidates[:, -1])
    if truncation.top_p < 1:
        if num_candidates == logits.shape[1]:
            candidates = logits.sort(dim=-1, descending=True).values
        total = torch.logsumexp(logits.masked_fill(logits < smallest[:, None], -torch.inf), dim=-1)
        probs = (candidates - total[:, None]).exp_().masked_fill_(candidates < smallest[:, None], 0.0)
        # A token stays while those before it have not reached top_p yet; the first one always does.
        is_cut = (probs.cumsum(dim=-1) - probs >= truncation.top_p) | (candidates < smallest[:, None])
        is_cut[:, 0] = False
        smallest = candidates.masked_fill(is_cut, torch.inf).amin(dim=-1)
    best_cut = logits.masked_fill(logits >= smallest[:, None], -torch.inf).amax(dim=-1)
    middle = (smallest + best_cut) / 2
    return torch.where(middle < smallest, middle, best_cut)


def cut_(logits: torch.Tensor, bounds: torch.Tensor, kept_columns: torch.Tensor, is_kept: torch.Tensor) -> None:
    """Set logits not above their row's bound to -inf, in place, but for the sampled token.

    The engine has sampled that token, so it was in the engine's set; where rounding puts it just outside of the
    trainer's, a logprob of -inf would be the wrong answer.

    Args:
        logits: `[R, C]`, some columns of the vocabulary.
        bounds: `[R]`, of `support_bounds`.
        kept_columns: `[R]` int64 in `[0, C)`, each row's sampled token.
        is_kept: `[R]` bool, whether it is among these columns.
    """
    sampled = logits.gather(1, kept_columns[:, None])
    logits.masked_fill_(logits <= bounds[:, None], -torch.inf)
    left = logits.gather(1, kept_columns[:, None])
    logits.scatter_(1, kept_columns[:, None], torch.where(is_kept[:, None], sampled, left))
