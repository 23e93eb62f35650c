"""The k3 estimator: values, unbiasedness of value and gradient, precision."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.algorithm.kl import token_kl


@settings(deadline=None, max_examples=60)
@given(st.floats(-20, 0), st.floats(-20, 0))
def test_kl_is_the_formula_and_is_positive_unless_equal(policy: float, ref: float) -> None:
    kl = token_kl(torch.tensor(policy, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64))
    difference = torch.tensor(ref - policy, dtype=torch.float64)
    torch.testing.assert_close(kl, difference.exp() - difference - 1, rtol=1e-7, atol=1e-12)
    assert kl >= -1e-15
    assert (kl == 0) if policy == ref else True


def test_the_mean_over_the_policys_own_tokens_is_the_kl_divergence() -> None:
    policy, ref = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    exact = (policy.exp() * (policy - ref)).sum()
    torch.testing.assert_close((policy.exp() * token_kl(policy, ref)).sum(), exact)


def gradient(*, corrected: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The expected gradient of the estimator at tokens of the old policy, and the gradient of the true KL."""
    generator = torch.Generator().manual_seed(2)
    logits, old_logits, ref_logits = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    policy, old, ref = logits.log_softmax(-1), old_logits.log_softmax(-1), ref_logits.log_softmax(-1)
    estimate = (old.exp() * token_kl(policy, ref, (policy - old).exp() if corrected else None)).sum()
    exact = (policy.exp() * (policy - ref)).sum()
    return torch.autograd.grad(estimate, logits, retain_graph=True)[0], torch.autograd.grad(exact, logits)[0]


def test_the_corrected_gradient_is_unbiased_for_tokens_of_older_weights() -> None:
    estimated, exact = gradient(corrected=True)
    torch.testing.assert_close(estimated, exact)


def test_the_plain_gradient_is_biased() -> None:
    estimated, exact = gradient(corrected=False)
    assert not torch.allclose(estimated, exact, atol=1e-2)  # the control of the test above


def test_models_that_nearly_agree_keep_their_digits_in_float32() -> None:
    policy = torch.tensor([-1.0])
    ref = policy + 1.7e-4
    difference = (ref - policy).double()
    exact = (difference**2 / 2 + difference**3 / 6).item()
    assert abs(token_kl(policy, ref).item() / exact - 1) < 3e-3
    naive = (ref - policy).exp() - (ref - policy) - 1
    assert abs(naive.item() / exact - 1) > 1e-2  # the control
