"""The LM head in tiles: values and gradients against the plain float64 computation, types and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.algorithm.lm_head import PLAIN, HeadForm, head_logprobs
from shoal.algorithm.logprobs import token_logprobs
from shoal.algorithm.truncation import Truncation
from shoal.errors import ConfigError

FORMS = {"plain": PLAIN, "scaled": HeadForm(scale=0.3), "capped": HeadForm(softcap=3.0)}
TRUNCATIONS = {"whole": None, "truncated": Truncation(top_k=6, top_p=0.9, min_p=0.01)}


def head(
    num_rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random hidden states, weight, bias and targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": normal(num_rows, width),
        "weight": normal(vocabulary, width),
        "bias": normal(vocabulary),
        "target_ids": torch.randint(0, vocabulary, (num_rows,), generator=generator),
    }


def plain_logits(parts: dict[str, torch.Tensor], form: HeadForm) -> torch.Tensor:
    logits = (parts["hidden"] @ parts["weight"].T + parts["bias"]) * form.scale
    return logits if form.softcap is None else form.softcap * torch.tanh(logits / form.softcap)


def with_gradient(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: value.clone().requires_grad_() if value.is_floating_point() else value for name, value in parts.items()
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("truncation", TRUNCATIONS)
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 9), st.integers(1, 13), st.floats(0.3, 2.0), st.integers(1, 60), st.integers(0, 2**20))
def test_values_and_gradients_are_those_of_the_plain_computation(
    form: str, truncation: str, num_rows: int, vocabulary: int, temperature: float, tile: int, seed: int
) -> None:
    parts = head(num_rows, 4, vocabulary, seed=seed)
    mine, theirs = with_gradient(parts), with_gradient(parts)
    upstream = torch.linspace(-1, 2, num_rows, dtype=torch.float64)
    found = head_logprobs(
        **mine, temperature=temperature, form=FORMS[form], truncation=TRUNCATIONS[truncation], max_tile_elements=tile
    )
    (found.logprobs * upstream).sum().backward()  # type: ignore[no-untyped-call]
    expected = token_logprobs(
        plain_logits(theirs, FORMS[form]), parts["target_ids"], temperature, truncation=TRUNCATIONS[truncation]
    )
    (expected.logprobs * upstream).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-10, atol=1e-10)
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(mine[name].grad, theirs[name].grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_passes_gradcheck(form: str) -> None:
    parts = with_gradient(head(3, 4, 7))

    def logprobs(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return head_logprobs(
            hidden, weight, bias, parts["target_ids"], 0.7, form=FORMS[form], max_tile_elements=5
        ).logprobs

    assert torch.autograd.gradcheck(logprobs, (parts["hidden"], parts["weight"], parts["bias"]))


def test_the_forms_give_different_logprobs() -> None:
    parts = head(5, 4, 9)
    plain, scaled, capped = (head_logprobs(**parts, temperature=1.0, form=form).logprobs for form in FORMS.values())
    assert (plain - scaled).abs().max() > 0.1 and (plain - capped).abs().max() > 0.1


def test_a_frozen_weight_costs_no_gradient_and_changes_none() -> None:
    parts = head(6, 4, 11)
    trained, frozen = with_gradient(parts), with_gradient(parts)
    frozen["weight"].requires_grad_(False)
    frozen["bias"].requires_grad_(False)
    for each in (trained, frozen):
        head_logprobs(**each, temperature=1.0, max_tile_elements=12).logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert frozen["weight"].grad is None and frozen["bias"].grad is None
    assert torch.equal(frozen["hidden"].grad, trained["hidden"].grad)  # type: ignore[arg-type]


def test_a_tied_weight_gets_the_gradient_of_both_its_uses() -> None:
    parts, ids = head(6, 4, 11), torch.arange(6)
    mine, theirs = parts["weight"].clone().requires_grad_(), parts["weight"].clone().requires_grad_()
    head_logprobs(mine[ids], mine, None, parts["target_ids"], 1.0, max_tile_elements=8).logprobs.sum().backward()  # type: ignore[no-untyped-call]
    logits = theirs[ids] @ theirs.T
    torch.log_softmax(logits, -1)[ids, parts["target_ids"]].sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_in_bfloat16_only_the_matrix_products_are_rounded() -> None:
    parts = head(40, 32, 300, torch.bfloat16)
    parts["hidden"] *= 0.3
    mine, theirs = with_gradient(parts), with_gradient(parts)
    found = head_logprobs(**mine, temperature=1.0, max_tile_elements=999)
    found.logprobs.sum().backward()  # type: ignore[no-untyped-call]
    logits = torch.nn.functional.linear(theirs["hidden"], theirs["weight"], theirs["bias"])
    expected = token_logprobs(logits, parts["target_ids"], 1.0)
    expected.logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert found.logprobs.dtype == torch.float32
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=0, atol=1e-5)
    for name in ("hidden", "weight", "bias"):
        gradient, plain = mine[name].grad, theirs[name].grad
        assert gradient is not None and plain is not None and gradient.dtype == torch.bfloat16
        assert (gradient - plain).float().norm() < 1e-2 * plain.float().norm()


def test_bfloat16_products_of_a_float32_weight_leave_a_float32_gradient() -> None:
    parts = with_gradient(head(8, 16, 50, torch.float32))
    exact = with_gradient(head(8, 16, 50, torch.float32))
    head_logprobs(**parts, temperature=1.0, dtype=torch.bfloat16).logprobs.sum().backward()  # type: ignore[no-untyped-call]
    head_logprobs(**exact, temperature=1.0).logprobs.sum().backward()  # type: ignore[no-untyped-call]
    for name in ("hidden", "weight", "bias"):
        gradient, reference = parts[name].grad, exact[name].grad
        assert gradient is not None and reference is not None and gradient.dtype == torch.float32
        assert 1e-5 < (gradient - reference).norm() / reference.norm() < 5e-2


def test_autocast_around_it_changes_nothing() -> None:
    parts = with_gradient(head(8, 16, 50, torch.float32))
    plain = head_logprobs(**parts, temperature=1.0).logprobs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head_logprobs(**parts, temperature=1.0).logprobs, plain)


def test_forbidden_tokens_leave_everything_finite() -> None:
    parts = with_gradient(head(4, 3, 10))
    with torch.no_grad():
        parts["bias"][2:6] = -torch.inf
    parts["target_ids"] = torch.tensor([0, 1, 7, 9])
    found = head_logprobs(**parts, temperature=1.0, max_tile_elements=4)
    found.logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(found.logprobs).all() and torch.isfinite(found.entropy).all()
    assert torch.isfinite(parts["hidden"].grad).all()  # type: ignore[arg-type]


def test_a_temperature_without_a_distribution_is_refused() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        head_logprobs(**head(1, 2, 3), temperature=0.0)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the most elements that any floating tensor made inside has."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_no_tensor_is_larger_than_a_tile_or_an_input(truncation: str) -> None:
    parts = with_gradient(head(64, 2, 256, torch.float32))
    with Largest() as seen:  # type: ignore[no-untyped-call]
        found = head_logprobs(**parts, temperature=1.0, truncation=TRUNCATIONS[truncation], max_tile_elements=1024)
        found.logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert seen.largest <= 1024
    with Largest() as control:  # type: ignore[no-untyped-call]
        plain_logits(parts, PLAIN)
    assert control.largest == 64 * 256


# ---- peak memory, measured in processes of their own ----

PEAK = """
import json, sys, torch
from pathlib import Path
from shoal.algorithm.lm_head import head_logprobs
from shoal.algorithm.logprobs import token_logprobs
torch.set_num_threads(1)
way, rows, width, vocabulary, tile = sys.argv[1], *map(int, sys.argv[2:])
hidden = torch.randn(rows, width).requires_grad_()
weight = torch.randn(vocabulary, width).requires_grad_()
targets = torch.randint(0, vocabulary, (rows,))
hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
def resident(name):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
def run(n, tile):
    if way == "tiles":
        found = head_logprobs(hidden[:n], weight, None, targets[:n], 1.0, max_tile_elements=tile)
    else:
        found = token_logprobs(hidden[:n] @ weight.T, targets[:n], 1.0, max_chunk_elements=tile)
    found.logprobs.sum().backward()
run(2, 1024)  # what libraries take once
Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use now
before = resident("VmRSS")
run(rows, tile)
print(json.dumps(resident("VmHWM") - before))
"""


def peak_bytes(way: str, *sizes: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, way, *map(str, sizes)],
        # What is freed goes back at once, so that what is in use is all that counts.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return int(json.loads(done.stdout))


def test_peak_memory_stays_within_the_documented_bound_and_far_below_the_logits() -> None:
    rows, width, vocabulary, tile = 1024, 64, 18992, 1 << 18  # a 256th of 32k x 151,936 logits
    bound = 4 * (4 * tile + width * 512)
    gradients = 4 * (rows * width + vocabulary * width)
    found = peak_bytes("tiles", rows, width, vocabulary, tile)
    logits = peak_bytes("logits", rows, width, vocabulary, tile)
    print(
        f"peak beyond inputs: {found / 2**20:.1f} MiB in tiles, {logits / 2**20:.1f} MiB with logits; "
        f"bound {(bound + gradients) / 2**20:.1f} MiB"
    )
    assert found < bound + gradients
    assert logits > 2 * rows * vocabulary * 4 > 8 * found


def test_the_documented_bound_allows_32k_tokens_of_a_150k_vocabulary_within_1_5_gb() -> None:
    from shoal.algorithm.lm_head import MAX_TILE_ELEMENTS

    tokens, width = 32768, 4096
    extra = 4 * (4 * MAX_TILE_ELEMENTS + tokens * width + width * int(MAX_TILE_ELEMENTS**0.5))
    assert extra < 1.5e9
    assert 2 * tokens * 151_936 > 6 * extra  # the control: the logits alone, in bfloat16
