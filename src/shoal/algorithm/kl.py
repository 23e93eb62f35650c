"""Estimate, per token, how far the policy has moved from the reference model."""

from __future__ import annotations

import torch


def token_kl(
    policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, ratio: torch.Tensor | None = None
) -> torch.Tensor:
    """Estimate KL(policy || reference) at each sampled token: `[N]`, 0 where the two agree, positive elsewhere.

    The "k3" estimator `exp(d) - d - 1` with `d = ref - policy` (http://joschu.net/blog/kl-approx.html; equation 4 of
    https://arxiv.org/abs/2402.03300). Its value is unbiased for tokens that the current policy wrote, its gradient is
    not. Times the importance ratio the gradient is unbiased too, also for tokens of older weights (section 3.1 of
    https://arxiv.org/abs/2512.02556); so the ratio must carry its gradient.

    Args:
        policy_logprobs: `[N]`, with gradient.
        ref_logprobs: `[N]`, without gradient.
        ratio: `[N]`, the unclipped importance ratio policy / old, with gradient; None for the plain estimator.
    """
    difference = ref_logprobs - policy_logprobs
    # expm1(d) - d keeps the digits that exp(d) - d - 1 loses when the two models nearly agree.
    kl = torch.expm1(difference) - difference
    return kl if ratio is None else kl * ratio
