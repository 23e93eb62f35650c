"""Token logprobs: values and gradients against log_softmax, chunking, types and memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.algorithm.logprobs import token_logprobs
from shoal.errors import ConfigError


def sample(num_rows: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits and targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(num_rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    return logits, torch.randint(0, vocabulary, (num_rows,), generator=generator)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 7), st.integers(1, 9), st.floats(0.1, 3.0), st.integers(1, 30), st.integers(0, 2**20))
def test_values_and_gradients_are_those_of_log_softmax(
    num_rows: int, vocabulary: int, temperature: float, chunk: int, seed: int
) -> None:
    logits, targets = sample(num_rows, vocabulary, torch.float64, seed)
    upstream = torch.linspace(-1, 2, num_rows, dtype=torch.float64)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    result = token_logprobs(mine, targets, temperature, max_chunk_elements=chunk)
    (result.logprobs * upstream).sum().backward()  # type: ignore[no-untyped-call]
    log_probs = torch.log_softmax(theirs / temperature, dim=-1)
    expected = log_probs.gather(1, targets[:, None]).squeeze(1)
    (expected * upstream).sum().backward()  # type: ignore[no-untyped-call]

    torch.testing.assert_close(result.logprobs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.entropy, -(log_probs.exp() * log_probs).sum(-1).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_the_gradient_passes_gradcheck() -> None:
    logits, targets = sample(3, 5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: token_logprobs(x, targets, 0.7, max_chunk_elements=10).logprobs, logits.requires_grad_()
    )


def test_the_size_of_the_chunks_changes_no_bit() -> None:
    logits, targets = sample(11, 13, torch.bfloat16)
    whole = token_logprobs(logits, targets, 1.0)
    for chunk in (1, 13, 40):
        parts = token_logprobs(logits, targets, 1.0, max_chunk_elements=chunk)
        assert torch.equal(parts.logprobs, whole.logprobs)
        assert torch.equal(parts.entropy, whole.entropy)


def test_bfloat16_logits_are_scored_in_float32() -> None:
    logits, targets = sample(50, 64, torch.bfloat16)
    result = token_logprobs(logits, targets, 1.0)
    exact = token_logprobs(logits.double(), targets, 1.0)
    assert result.logprobs.dtype == result.entropy.dtype == torch.float32
    torch.testing.assert_close(result.logprobs.double(), exact.logprobs, rtol=1e-5, atol=1e-5)
    in_bfloat16 = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1).double()
    assert (in_bfloat16 - exact.logprobs).abs().max() > 1e-3  # the control: bfloat16 would show


def test_the_gradient_has_the_type_of_the_logits() -> None:
    logits, targets = sample(4, 8, torch.bfloat16)
    logits.requires_grad_()
    token_logprobs(logits, targets, 1.0).logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double().sum(-1), torch.zeros(4, dtype=torch.float64), atol=2e-2, rtol=0)


def test_uniform_logits_have_the_known_logprob_and_entropy() -> None:
    result = token_logprobs(torch.full((2, 8), 5.0), torch.tensor([0, 7]), 0.3)
    log8 = torch.tensor(8.0).log()
    torch.testing.assert_close(result.logprobs, -log8.expand(2))
    torch.testing.assert_close(result.entropy, log8.expand(2))


def test_tokens_that_the_model_forbids_leave_entropy_and_gradient_finite() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 2.0]], requires_grad=True)
    result = token_logprobs(logits, torch.tensor([2]), 1.0)
    result.logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(result.entropy).all()


def test_huge_logits_do_not_overflow() -> None:
    result = token_logprobs(torch.tensor([[3e38, 0.0]]), torch.tensor([0]), 1.0)
    assert result.logprobs.item() == 0
    assert result.entropy.item() == 0


class LargestFloat(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the most elements that any float32 tensor made inside has."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.largest = max(self.largest, tensor.numel())
        return out


def test_no_float32_tensor_is_larger_than_a_chunk_forward_or_backward() -> None:
    logits, targets = sample(64, 32, torch.bfloat16)
    logits.requires_grad_()
    with LargestFloat() as seen:  # type: ignore[no-untyped-call]
        token_logprobs(logits, targets, 1.0, max_chunk_elements=128).logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert seen.largest == 128
    with LargestFloat() as control:  # type: ignore[no-untyped-call]
        torch.log_softmax(logits.float(), dim=-1)
    assert control.largest == 64 * 32


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_without_a_distribution_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        token_logprobs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), temperature)
