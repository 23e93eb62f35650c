"""Logprobs on a GPU: the memory and the exactness of the LM head in tiles, and torch's kernel for packed sequences.

Run on a machine with NVIDIA GPUs: `pytest tests/gpu`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.algorithm import lm_head
from shoal.algorithm.lm_head import PLAIN, HeadForm, head_logprobs
from shoal.algorithm.logprobs import token_logprobs
from shoal.algorithm.truncation import Truncation
from shoal.data.micro_batch import build_micro_batch
from shoal.testing import tiny_model
from shoal.testing.sequences import random_sequences
from shoal.trainer.attention import VARLEN, register_varlen, varlen_kernel
from shoal.trainer.forward import packed_logprobs, packs_exactly
from shoal.trainer.step import to_device

NUM_TOKENS = 32 << 10
VOCABULARY = 151_936
MAX_EXTRA_BYTES = 1.5 * (1 << 30)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
]


@pytest.mark.parametrize("width", [2048, 4096])
def test_32k_tokens_of_a_large_vocabulary_take_little_memory_and_give_the_plain_values(width: int) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, width, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(VOCABULARY, width, generator=generator, device="cuda", dtype=torch.bfloat16) / width**0.5
    target = torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator, device="cuda")
    # As gradients of a loss are, small and of either sign.
    scale = torch.randn(NUM_TOKENS, generator=generator, device="cuda") / NUM_TOKENS
    hidden.requires_grad_()
    weight.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    found = head_logprobs(hidden, weight, None, target, 0.7)
    (found.logprobs * scale).sum().backward()  # type: ignore[no-untyped-call]

    assert hidden.grad is not None and weight.grad is not None
    extra = torch.cuda.max_memory_allocated() - before - hidden.grad.nbytes - weight.grad.nbytes
    print(f"width {width}: {extra / (1 << 30):.2f} GiB beyond inputs and their gradients")
    assert extra < MAX_EXTRA_BYTES

    logprobs, entropy, hidden_grad, weight_grad = _plain(hidden.detach(), weight.detach(), target, scale)
    # The logits' rounding to bfloat16, up to 2^-6 each at most.
    assert (found.logprobs - logprobs).abs().max() < 4e-2
    assert (found.logprobs - logprobs).abs().mean() < 4e-3
    assert (found.entropy - entropy).abs().max() < 2e-2
    for gradient, expected in ((hidden.grad, hidden_grad), (weight.grad, weight_grad)):
        assert _relative(gradient, expected) < 1e-2
        # The control: what is compared is not all alike.
        assert _relative(gradient.roll(1, dims=0), expected) > 0.5


def _plain(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Compute the same from whole float32 logits, some rows at a time so that they fit."""
    weight32 = weight.float().requires_grad_()
    logprobs, entropies, gradients = [], [], []
    for rows in torch.arange(NUM_TOKENS, device="cuda").split(4096):
        part = hidden[rows].float().requires_grad_()
        found = token_logprobs(part @ weight32.T, target[rows], 0.7)
        (found.logprobs * scale[rows]).sum().backward()  # type: ignore[no-untyped-call]
        logprobs.append(found.logprobs.detach())
        entropies.append(found.entropy.detach())
        gradients.append(part.grad)
    assert weight32.grad is not None
    return torch.cat(logprobs), torch.cat(entropies), torch.cat(gradients), weight32.grad


@pytest.mark.parametrize("truncation", [None, Truncation(top_k=600, top_p=0.9)], ids=["whole", "truncated"])
@pytest.mark.parametrize("form", [PLAIN, HeadForm(scale=0.3), HeadForm(softcap=3.0)], ids=["plain", "scaled", "capped"])
def test_the_kernels_give_what_the_torch_operations_give(
    form: HeadForm, truncation: Truncation | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    inputs = [torch.randn(size, 256, generator=generator, device="cuda") for size in (777, 20_000)]
    target = torch.randint(20_000, (777,), generator=generator, device="cuda")
    found = []
    for has_kernels in (True, False):
        if not has_kernels:
            monkeypatch.setattr(lm_head, "find_kernels", lambda device, dtype: None)
        hidden, weight = (value.clone().requires_grad_() for value in inputs)
        result = head_logprobs(hidden, weight, None, target, 0.7, form=form, truncation=truncation)
        result.logprobs.sum().backward()  # type: ignore[no-untyped-call]
        found.append((result.logprobs.detach(), result.entropy, hidden.grad, weight.grad))
    for ours, expected in zip(*found, strict=True):
        assert ours is not None and expected is not None
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_torchs_kernel_for_packed_sequences_gives_what_each_sequence_gives_alone() -> None:
    kernel = varlen_kernel()
    if kernel is None:
        pytest.skip(f"torch {torch.__version__} has no variable-length attention that can be causal")
    register_varlen(kernel)
    batch = to_device(build_micro_batch(sequences := random_sequences(), [1.0] * len(sequences)), torch.device("cuda"))
    found = {}
    for name in (VARLEN, "sdpa"):
        model = _model(name)
        logprobs = packed_logprobs(
            model, batch, temperature=1.0, keeps_logits=True, takes_boundaries=name == VARLEN
        ).logprobs
        logprobs.sum().backward()  # type: ignore[no-untyped-call]
        gradients = torch.cat([value.grad.flatten().float() for value in model.parameters()])
        found[name] = (logprobs.detach(), gradients)
        if name == VARLEN:
            assert packs_exactly(model)
    assert (found[VARLEN][0] - found["sdpa"][0]).abs().mean() < 0.03
    assert _relative(found[VARLEN][1], found["sdpa"][1]) < 0.03


def _model(attention: str) -> Any:
    model = tiny_model(dtype=torch.bfloat16, hidden_size=256, head_dim=64, initializer_range=0.05).cuda()
    model.set_attn_implementation(attention)
    return model


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())
