"""Carry float32 values, and their gradient, through a conversion to bfloat16 and back without loss.

FSDP2 converts whatever a model returns to its `output_dtype` (bfloat16 under accelerate's mixed precision). A float32
number has 24 significant bits and a bfloat16 number 8, so three of these hold it exactly.
"""

from __future__ import annotations

from typing import Any

import torch

NUM_PARTS = 3


def to_parts(values: torch.Tensor) -> torch.Tensor:
    """Split float32 or float64 values into three summands each, `[..., 3]`.

    The first two are exact in bfloat16; the third is too if the values are float32. The gradients of a value's
    parts are those that `from_parts` has split, so they are summed.
    """
    parts: torch.Tensor = _ToParts.apply(values)  # type: ignore[no-untyped-call]
    return parts


def from_parts(parts: torch.Tensor) -> torch.Tensor:
    """Put `[..., 3]` parts of any float type together again: float64 if they are, else float32."""
    values: torch.Tensor = _FromParts.apply(parts)  # type: ignore[no-untyped-call]
    return values


class _ToParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return _split(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _sum(grad)


class _FromParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor) -> torch.Tensor:
        ctx.dtype = parts.dtype
        return _sum(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _split(grad).to(ctx.dtype)


def _split(values: torch.Tensor) -> torch.Tensor:
    first = values.bfloat16().to(values.dtype)
    rest = values - first
    second = rest.bfloat16().to(values.dtype)
    # An infinite value leaves inf - inf.
    parts = torch.stack([first, second, rest - second], dim=-1)
    whole = torch.isfinite(values)[..., None]
    return torch.where(whole, parts, torch.stack([values, *[torch.zeros_like(values)] * 2], dim=-1))


def _sum(parts: torch.Tensor) -> torch.Tensor:
    wide = parts if parts.dtype == torch.float64 else parts.float()
    return wide[..., 0] + wide[..., 1] + wide[..., 2]
