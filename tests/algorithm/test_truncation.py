"""Truncated sampling: the tokens that stay are vLLM's, and the logprobs are of the distribution over them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.algorithm.logprobs import token_logprobs
from shoal.algorithm.truncation import Truncation, find_support

TRUNCATIONS = st.builds(
    Truncation,
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1.0),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 0.9)),
)


def staying(logits: list[float], truncation: Truncation) -> list[bool]:
    """One row, in vLLM's order, written out."""
    best = max(logits)
    stays = [math.exp(x - best) >= truncation.min_p for x in logits]
    left = sorted((x for x, s in zip(logits, stays, strict=True) if s), reverse=True)
    if truncation.top_k > 0:
        smallest = left[min(truncation.top_k, len(left)) - 1]
        stays = [s and x >= smallest for s, x in zip(stays, logits, strict=True)]
    left = sorted((x for x, s in zip(logits, stays, strict=True) if s), reverse=True)
    total, before, smallest = sum(math.exp(x - best) for x in left), 0.0, best
    for x in left:
        if before >= truncation.top_p * total and truncation.top_p < 1:
            break
        smallest, before = x, before + math.exp(x - best)
    return [s and x >= smallest for s, x in zip(stays, logits, strict=True)]


def left_of(logits: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    return logits > find_support(logits, logits.argmax(-1), truncation).low[:, None]


def random_logits(num_rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(num_rows, vocabulary, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=150)
@given(TRUNCATIONS, st.integers(1, 12), st.integers(0, 2**20))
def test_the_tokens_that_stay_are_those_of_the_written_out_rule(
    truncation: Truncation, vocabulary: int, seed: int
) -> None:
    logits = random_logits(3, vocabulary, seed)
    found = left_of(logits, truncation)
    assert found.tolist() == [staying(row, truncation) for row in logits.tolist()]


def test_what_the_filters_leave_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()

    def left(**filters: float) -> list[bool]:
        return left_of(logits, Truncation(**filters))[0].tolist()  # type: ignore[arg-type]

    assert left(top_k=2) == [True, True, False, False]
    assert left(top_p=0.79) == [True, True, False, False]
    assert left(top_p=0.81) == [True, True, True, False]
    assert left(min_p=0.25) == [True, True, True, False]
    # Renormalised over the two that top-k leaves, the first has 0.625.
    assert left(top_k=2, top_p=0.6) == [True, False, False, False]
    assert left(top_p=0.6) == [True, True, False, False]  # the control: without top-k it has 0.5


@pytest.mark.parametrize(("sampled", "wanted"), [(0, 0.0), (1, -2.0), (2, -2.0), (4, -3.0)])
def test_of_tokens_tied_for_the_last_places_as_many_count_as_there_are_places(sampled: int, wanted: float) -> None:
    # Two of the three that are tied have a place. Whoever it was, the engine has divided by the sum of three tokens.
    logits = torch.tensor([[0.0, -2.0, -2.0, -2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    found = token_logprobs(logits, torch.tensor([sampled]), 1.0, truncation=Truncation(top_k=3))
    total = 1 + 2 * math.exp(-2) + (math.exp(-3) if sampled == 4 else 0.0)
    assert found.logprobs.item() == pytest.approx(wanted - math.log(total))
    found.logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.sum().item() == pytest.approx(0.0, abs=1e-12)
    others = [i for i in (1, 2, 3) if i != sampled]
    share = (1 if sampled in (1, 2, 3) else 2) / len(others)
    for token in others:
        assert logits.grad[0, token].item() == pytest.approx(-share * math.exp(-2) / total)


def test_top_p_counts_tied_tokens_alike() -> None:
    logits = torch.tensor([[0.4, 0.2, 0.2, 0.2]], dtype=torch.float64).log()
    found = token_logprobs(logits, torch.tensor([0]), 1.0, truncation=Truncation(top_p=0.55))
    assert found.logprobs.item() == pytest.approx(math.log(0.4 / 0.6))


def test_neighbouring_numbers_fall_on_the_right_sides_of_the_bound() -> None:
    for value in (1.0, -1.0, 17.123):
        high = torch.tensor(value)
        low = torch.nextafter(high, torch.tensor(-torch.inf))
        logits = torch.stack([high, low])[None]
        assert left_of(logits, Truncation(top_k=1)).tolist() == [[True, False]]


@settings(deadline=None, max_examples=60)
@given(TRUNCATIONS, st.floats(0.3, 2.0), st.integers(1, 40), st.integers(0, 2**20))
def test_logprobs_entropy_and_gradient_are_those_of_the_distribution_over_what_stays(
    truncation: Truncation, temperature: float, chunk: int, seed: int
) -> None:
    logits = random_logits(5, 11, seed)
    targets = torch.randint(0, 11, (5,), generator=torch.Generator().manual_seed(seed))
    upstream = torch.linspace(-1, 2, 5, dtype=torch.float64)
    stays = torch.tensor([staying(row, truncation) for row in (logits / temperature).tolist()])
    stays[torch.arange(5), targets] = True
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    found = token_logprobs(mine, targets, temperature, truncation=truncation, max_chunk_elements=chunk)
    (found.logprobs * upstream).sum().backward()  # type: ignore[no-untyped-call]
    distribution = torch.distributions.Categorical(
        logits=(theirs / temperature).masked_fill(~stays, -1e9), validate_args=False
    )
    expected = distribution.log_prob(targets)
    (expected * upstream).sum().backward()  # type: ignore[no-untyped-call]

    torch.testing.assert_close(found.logprobs, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.entropy, distribution.entropy().detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_a_sampled_token_outside_of_the_trainers_set_is_kept_in_it() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], requires_grad=True)
    found = token_logprobs(logits, torch.tensor([2]), 1.0, truncation=Truncation(top_k=2))
    found.logprobs.sum().backward()  # type: ignore[no-untyped-call]
    expected = torch.log_softmax(torch.tensor([2.0, 1.0, 0.0]), dim=0)[2]
    torch.testing.assert_close(found.logprobs[0], expected)
    assert logits.grad is not None and logits.grad[0, 3] == 0 and logits.grad[0, 2] > 0


def test_without_truncation_the_logprobs_are_others() -> None:
    logits, targets = random_logits(4, 30, 0), torch.zeros(4, dtype=torch.long)
    whole = token_logprobs(logits, targets, 1.0).logprobs
    assert torch.equal(token_logprobs(logits, targets, 1.0, truncation=Truncation()).logprobs, whole)
    assert (token_logprobs(logits, targets, 1.0, truncation=Truncation(top_k=3)).logprobs - whole).abs().max() > 0.1


@pytest.mark.parametrize("filters", [{"top_k": -1}, {"top_p": 1.0}, {"min_p": 0.0}])
def test_values_that_cut_nothing_off_are_off(filters: dict[str, float]) -> None:
    assert Truncation(**filters).is_off  # type: ignore[arg-type]
    assert not Truncation(top_k=1).is_off and not Truncation(top_p=0.9).is_off and not Truncation(min_p=0.1).is_off
