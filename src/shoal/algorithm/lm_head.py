"""Logprobs and entropy from hidden states and the LM head's weight, with no `[tokens, vocabulary]` tensor at any time.

The vocabulary is taken a block at a time, and within a block the rows, so a tile of logits is all that exists. The
backward pass computes each tile again. The block's part of the weight is converted once, its gradient is summed in
float32 over all rows and written once, whatever the type of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from shoal.algorithm.logprobs import TokenLogprobs, check_temperature
from shoal.algorithm.truncation import Support, Truncation, cut_, find_support

MAX_TILE_ELEMENTS = 1 << 24
"""Logits of a tile: 4096 x 4096, large enough for a matrix product to run at full speed; 64 MiB in float32.

Beyond its inputs and their gradients the computation takes at most about

    4 * (4 * MAX_TILE_ELEMENTS + N * H * [hidden is 16-bit] + 2 * H * sqrt(MAX_TILE_ELEMENTS)) bytes

(four float32 tiles' worth of temporaries, the sum of the hidden states' gradient, one block of the weight's gradient):
0.9 GiB for 32k tokens of width 4096, whatever the vocabulary. The logits alone would be 9.3 GiB in bfloat16, and
18.6 GiB in float32, for a vocabulary of 151,936. Truncated sampling adds a pass over whole rows, as
many at a time as make a tile, with some ten tiles' worth of temporaries (the sort's among them).

On GPUs with Triton one kernel does what is between two matrix products, in place (`lm_head_cuda.py`), and a tile is as
large as the four were.
"""
_TILES_IN_ONE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadForm:
    """What a model does to `hidden @ weight.T + bias`: `logits = softcap * tanh(scale * it / softcap)`.

    Attributes:
        scale: 1 for most models; Granite and Cohere have another.
        softcap: Gemma 2's bound; None for none.
    """

    scale: float = 1.0
    softcap: float | None = None


PLAIN = HeadForm()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What forward and backward pass have in common."""

    temperature: float
    form: HeadForm
    truncation: Truncation | None
    dtype: torch.dtype
    max_tile_elements: int

    @property
    def sum_dtype(self) -> torch.dtype:
        """Type of everything after the matrix product."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def head_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target_ids: torch.Tensor,
    temperature: float,
    *,
    form: HeadForm = PLAIN,
    truncation: Truncation | None = None,
    dtype: torch.dtype | None = None,
    max_tile_elements: int = MAX_TILE_ELEMENTS,
) -> TokenLogprobs:
    """Give each target's logprob and the entropy under `softmax(logits / temperature)`, from what makes the logits.

    The same as `token_logprobs(logits, ...)`, with gradient to `hidden`, `weight` and `bias`. The matrix products are
    of type `dtype`, all else is float32 (float64 if that is float64).

    Args:
        hidden: `[N, H]`.
        weight: `[V, H]`.
        bias: `[V]`, or None.
        target_ids: `[N]` int64, in `[0, V)`.
        temperature: Above 0.
        form: What the model does to the head's output.
        truncation: What the engines cut off; the set of tokens that stay is a constant for the gradient.
        dtype: Of the matrix products; None for the weight's own.
        max_tile_elements: Bound on the logits that exist at a time.

    Raises:
        ConfigError: The temperature is not above 0.
    """
    check_temperature(temperature)
    settings = _Settings(
        temperature=temperature,
        form=form,
        truncation=None if truncation is None or truncation.is_off else truncation,
        dtype=dtype or weight.dtype,
        max_tile_elements=max_tile_elements,
    )
    logprobs, entropy = _HeadLogprobs.apply(hidden, weight, bias, target_ids, settings)  # type: ignore[no-untyped-call]
    return TokenLogprobs(logprobs=logprobs, entropy=entropy)


class _HeadLogprobs(torch.autograd.Function):
    """Forward: each block's logsumexp and entropy, then put together. Backward: each tile's gradient, summed up."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target_ids: torch.Tensor,
        settings: _Settings,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = _Tiles(hidden, weight, bias, target_ids, settings)
            shape = (len(tiles.blocks), len(hidden))
            normalizers = torch.zeros(shape, dtype=settings.sum_dtype, device=hidden.device)
            entropies = torch.zeros_like(normalizers)
            sampled = torch.zeros_like(normalizers[0])
            for index, columns in enumerate(tiles.blocks):
                block = tiles.block(columns)
                for rows in tiles.rows:
                    found, normalizers[index, rows], entropies[index, rows] = tiles.statistics(rows, block, columns)
                    sampled[rows] += found
            normalizer = torch.logsumexp(normalizers, dim=0)
            # The entropy of a choice among blocks, and then within one.
            share = (normalizers - normalizer).exp_()
            entropy = (torch.special.entr(share) + share * entropies).sum(dim=0)
        support = tiles.support
        bounds = () if support is None else (support.low, support.high, support.log_share)
        ctx.save_for_backward(hidden, weight, bias, target_ids, normalizer, *bounds)
        ctx.settings = settings
        ctx.mark_non_differentiable(entropy)
        return sampled - normalizer, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, target_ids, normalizer, *bounds = ctx.saved_tensors
        support = Support(*bounds) if bounds else None
        settings: _Settings = ctx.settings
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = _Tiles(hidden, weight, bias, target_ids, settings, support)
            scale = grad_logprobs / settings.temperature
            grad_hidden = torch.zeros_like(hidden, dtype=settings.sum_dtype) if needs_hidden else None
            grad_weight = torch.empty_like(weight) if needs_weight else None
            grad_bias = torch.zeros_like(bias) if needs_bias else None
            for columns in tiles.blocks:
                block = tiles.block(columns)
                grad_block = torch.zeros_like(block[0], dtype=settings.sum_dtype) if needs_weight else None
                for rows in tiles.rows:
                    grad = tiles.gradient(rows, block, columns, normalizer, scale)
                    if grad_bias is not None:
                        grad_bias[columns] += grad.sum(dim=0, dtype=settings.sum_dtype).to(grad_bias.dtype)
                    grad = grad.to(settings.dtype)
                    if grad_hidden is not None:
                        _add_product_(grad_hidden[rows], grad, block[0])
                    if grad_block is not None:
                        _add_product_(grad_block, grad.T, hidden[rows].to(settings.dtype))
                if grad_weight is not None and grad_block is not None:
                    grad_weight[columns] = grad_block.to(grad_weight.dtype)
            return (
                None if grad_hidden is None else grad_hidden.to(hidden.dtype),
                grad_weight,
                grad_bias,
                None,
                None,
            )


def find_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Return `lm_head_cuda`, where its kernels take tiles of this type; the torch operations give the same."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from shoal.algorithm import lm_head_cuda

    return lm_head_cuda if dtype in lm_head_cuda.TYPES else None


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a matrix product to a sum of the same or a wider type, in place."""
    if total.is_cuda and total.dtype == torch.float32 != left.dtype:
        # In one pass, and with no rounding of the product to 16 bits.
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    else:
        total += left @ right


_Block = tuple[torch.Tensor, torch.Tensor | None]
_Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Tiles:
    """The logits of all rows and tokens, a tile at a time. Records nothing for autograd."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target_ids: torch.Tensor,
        settings: _Settings,
        support: Support | None = None,
    ) -> None:
        self._hidden, self._weight, self._bias = hidden, weight, bias
        self._target_ids, self._settings = target_ids, settings
        self._kernels = find_kernels(hidden.device, settings.dtype)
        max_elements = settings.max_tile_elements * (1 if self._kernels is None else _TILES_IN_ONE)
        num_rows = max(1, min(len(hidden), math.isqrt(max_elements)))
        self.rows = tuple(_slices(len(hidden), num_rows))
        self.blocks = tuple(_slices(len(weight), max(1, max_elements // num_rows)))
        self.support = support
        if support is None and settings.truncation is not None:
            self.support = self._find_support(settings.truncation)

    def block(self, columns: slice) -> _Block:
        """Return a block of the weight and the bias in the type of the matrix products."""
        bias = None if self._bias is None else self._bias[columns].to(self._settings.dtype)
        return self._weight[columns].to(self._settings.dtype), bias

    def statistics(self, rows: slice, block: _Block, columns: slice) -> _Statistics:
        """Return each row's sampled logit (0 if it is in another tile), logsumexp and entropy within a tile, `[R]`."""
        if self._kernels is not None:
            found: _Statistics = self._kernels.tile_statistics(
                self._raw(rows, block), **self._for_kernels(rows, columns)
            )
            return found
        logits = self._whole(rows, block)
        target, is_here = self._cut(logits, rows, columns)
        sampled = torch.where(is_here, logits.gather(1, target[:, None]).squeeze(1), 0.0)
        normalizer = torch.logsumexp(logits, dim=-1)
        # A block of which nothing is left has normalizer -inf, and must not give NaN.
        finite = normalizer.clamp(min=torch.finfo(logits.dtype).min)
        entropy = torch.special.entr(logits.sub_(finite[:, None]).exp_()).sum(dim=-1)
        return sampled, normalizer, entropy

    def _cut(self, logits: torch.Tensor, rows: slice, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Truncate a tile in place; return each row's target in it, and whether it is there."""
        target = self._target_ids[rows] - columns.start
        is_here = (target >= 0) & (target < logits.shape[1])
        target = target.clamp(0, logits.shape[1] - 1)
        if self.support is not None:
            cut_(logits, self.support.rows(rows), target, is_here)
        return target, is_here

    def gradient(
        self, rows: slice, block: _Block, columns: slice, normalizer: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient with respect to a tile of `hidden @ weight.T + bias`.

        Args:
            rows: Of the tile.
            block: Of the weight.
            columns: Where it lies.
            normalizer: `[N]`.
            scale: `[N]`, the gradient of each logprob, over the temperature.
        """
        if self._kernels is not None:
            raw, about = self._raw(rows, block), self._for_kernels(rows, columns)
            self._kernels.tile_gradient_(raw, normalizer=normalizer[rows], scale=scale[rows], **about)
            return raw
        logits, form = self._whole(rows, block), self._settings.form
        slope = None
        if form.softcap is not None:
            slope = 1 - (logits * (self._settings.temperature / form.softcap)).square_()
        target, is_here = self._cut(logits, rows, columns)
        # d logprob / d logits = (onehot(target) - softmax) / temperature
        grad = logits.sub_(normalizer[rows, None]).exp_().mul_(-scale[rows, None])
        grad.scatter_add_(1, target[:, None], (scale[rows] * is_here)[:, None])
        if slope is not None:
            grad.mul_(slope)
        return grad if form.scale == 1 else grad.mul_(form.scale)

    def _raw(self, rows: slice, block: _Block) -> torch.Tensor:
        """Return what the head makes of some rows: a tile of its output."""
        return torch.nn.functional.linear(self._hidden[rows].to(self._settings.dtype), *block)

    def _for_kernels(self, rows: slice, columns: slice) -> dict[str, Any]:
        """Return what the kernels need to know about a tile."""
        return {
            "columns": self._target_ids[rows] - columns.start,
            "form": self._settings.form,
            "temperature": self._settings.temperature,
            "support": None if self.support is None else self.support.rows(rows),
        }

    def _whole(self, rows: slice, block: _Block) -> torch.Tensor:
        """Return a tile's logits after temperature."""
        settings, form = self._settings, self._settings.form
        logits = self._raw(rows, block).to(settings.sum_dtype)
        if form.scale != 1:
            logits = logits.mul_(form.scale)
        if form.softcap is not None:
            logits = logits.div_(form.softcap).tanh_().mul_(form.softcap)
        return logits.div_(settings.temperature)

    def _find_support(self, truncation: Truncation) -> Support:
        """Find what is left of each row, which takes its whole row of logits."""
        num_rows = max(1, self._settings.max_tile_elements // max(1, len(self._weight)))
        found = []
        for rows in _slices(len(self._hidden), num_rows):
            whole = torch.cat([self._whole(rows, self.block(columns)) for columns in self.blocks], dim=1)
            found.append(find_support(whole, self._target_ids[rows], truncation))
        empty = self._hidden.new_empty(0, dtype=self._settings.sum_dtype)
        return Support(
            low=torch.cat([empty, *(part.low for part in found)]),
            high=torch.cat([empty, *(part.high for part in found)]),
            log_share=torch.cat([empty, *(part.log_share for part in found)]),
        )


def _slices(length: int, size: int) -> Iterator[slice]:
    """Cut `range(length)` into slices of at most `size`."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
