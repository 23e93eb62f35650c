"""Three bfloat16 numbers hold a float32 number, and its gradient."""

from __future__ import annotations

import pytest
import torch

from shoal.algorithm.exact_parts import from_parts, to_parts


def values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-20, 12, (500,), generator=generator)
    return torch.ldexp(torch.randn(500, generator=generator), exponents)


def test_float32_comes_back_bit_for_bit_through_bfloat16() -> None:
    x = values()
    assert torch.equal(from_parts(to_parts(x).bfloat16()), x)
    assert not torch.equal(x.bfloat16().float(), x)  # the control


def test_so_does_its_gradient() -> None:
    x, gradient = torch.ones(500, requires_grad=True), values()
    (from_parts(to_parts(x).bfloat16()) * gradient).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(x.grad, gradient)  # type: ignore[arg-type]
    control = torch.ones(500, requires_grad=True)
    (control.bfloat16().float() * gradient).sum().backward()  # type: ignore[no-untyped-call]
    assert not torch.equal(control.grad, gradient)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_conversion_nothing_is_lost_at_all(dtype: torch.dtype) -> None:
    x = torch.tensor([1 / 3, -1e-30, 12345.6789, 0.0, float("inf"), float("-inf")], dtype=dtype)
    assert torch.equal(from_parts(to_parts(x)), x)
    assert bool(torch.isnan(from_parts(to_parts(torch.tensor([float("nan")])))).all())
