"""What is done with a tile of logits on a GPU, in one pass over it: the logits stay as the matrix product wrote them.

Each row is a program. The forward pass reads a tile once and returns three numbers for each row; the backward pass
replaces a tile by its gradient. The arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.algorithm.lm_head import HeadForm
from shoal.algorithm.truncation import Support

TYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = 4096
_NUM_WARPS = 8


def tile_statistics(
    raw: torch.Tensor, columns: torch.Tensor, form: HeadForm, temperature: float, support: Support | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each row's sampled logit, logsumexp and entropy within the tile, all `[R]` float32.

    Args:
        raw: `[R, C]`, the head's output, of one of `TYPES`.
        columns: `[R]` int64, the sampled token's column; outside of `[0, C)` where it is not in this tile, which gives
            a sampled logit of 0.
        form: What the model does to it.
        temperature: By which that is divided then.
        support: What truncated sampling leaves of these rows.
    """
    found = torch.empty(3, len(raw), dtype=torch.float32, device=raw.device)
    _statistics[(len(raw),)](
        raw,
        columns,
        *_bounds(raw, support),
        found,
        raw.shape[0],
        raw.shape[1],
        raw.stride(0),
        **_constants(form, temperature),
        HAS_SUPPORT=support is not None,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )
    return found[0], found[1], found[2]


def tile_gradient_(
    raw: torch.Tensor,
    columns: torch.Tensor,
    normalizer: torch.Tensor,
    scale: torch.Tensor,
    form: HeadForm,
    temperature: float,
    support: Support | None,
) -> None:
    """Replace the head's output by the gradient with respect to it.

    Args:
        raw: `[R, C]`, of one of `TYPES`.
        columns: As in `tile_statistics`.
        normalizer: `[R]` float32, logsumexp of the whole rows.
        scale: `[R]` float32, the gradient of each row's logprob, over the temperature.
        form: What the model does to it.
        temperature: By which that is divided then.
        support: What truncated sampling leaves of these rows.
    """
    _gradient[(len(raw), triton.cdiv(raw.shape[1], _BLOCK))](
        raw,
        columns,
        *_bounds(raw, support),
        normalizer,
        scale,
        raw.shape[1],
        raw.stride(0),
        **_constants(form, temperature),
        HAS_SUPPORT=support is not None,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )


def _bounds(raw: torch.Tensor, support: Support | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the bounds; without any, something for the kernel not to read."""
    return (raw, raw, raw) if support is None else (support.low, support.high, support.log_share)


def _constants(form: HeadForm, temperature: float) -> dict[str, float]:
    """Return what makes a logit of the head's output as constants of the kernels: it is the same for a whole run."""
    return {"SCALE": form.scale, "SOFTCAP": form.softcap or 0.0, "TEMPERATURE": temperature}


@triton.jit
def _statistics(
    raw,
    columns,
    low,
    high,
    log_share,
    found,
    num_rows,
    num_columns,
    stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    HAS_SUPPORT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sampled_column = tl.load(columns + row)
    # Sums of exp(logit - largest) and of exp(logit - largest) * (logit - largest), over what has been read.
    largest = -float("inf")
    total = 0.0
    weighted = 0.0
    sampled = 0.0
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_sampled = (column == sampled_column) & (column < num_columns)
        logit = _logit(raw + row * stride, column, num_columns, SCALE, SOFTCAP, TEMPERATURE)
        if HAS_SUPPORT:
            logit = _cut(logit, is_sampled, low, high, log_share, row)
        sampled += tl.sum(tl.where(is_sampled, logit, 0.0))
        new_largest = tl.maximum(largest, tl.max(logit))
        # A row of which nothing is left so far: subtract 0, and -inf stays what it is.
        shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        shrink = tl.exp(largest - shift)
        below = tl.where(largest == -float("inf"), 0.0, largest - shift)
        weighted = shrink * (weighted + below * total)
        total = shrink * total
        power = tl.exp(logit - shift)
        weighted += tl.sum(power * tl.where(power > 0, logit - shift, 0.0))
        total += tl.sum(power)
        largest = new_largest
    is_empty = total == 0
    sum_of = tl.where(is_empty, 1.0, total)
    tl.store(found + row, sampled)
    tl.store(found + num_rows + row, tl.where(is_empty, -float("inf"), largest + tl.log(sum_of)))
    tl.store(found + 2 * num_rows + row, tl.where(is_empty, 0.0, tl.log(sum_of) - weighted / sum_of))


@triton.jit
def _gradient(
    raw,
    columns,
    low,
    high,
    log_share,
    normalizer,
    scale,
    num_columns,
    stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    HAS_SUPPORT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_sampled = column == tl.load(columns + row)
    logit = _logit(raw + row * stride, column, num_columns, SCALE, SOFTCAP, TEMPERATURE)
    whole = logit
    if HAS_SUPPORT:
        logit = _cut(logit, is_sampled, low, high, log_share, row)
    # d logprob / d logits = (onehot(sampled) - softmax) / temperature
    softmax = tl.exp(logit - tl.load(normalizer + row))
    grad = tl.load(scale + row) * (tl.where(is_sampled, 1.0, 0.0) - softmax)
    if SOFTCAP > 0:
        capped = whole * (TEMPERATURE / SOFTCAP)
        grad *= 1.0 - capped * capped
    if SCALE != 1:
        grad *= SCALE
    tl.store(raw + row * stride + column, grad.to(raw.dtype.element_ty), mask=column < num_columns)


@triton.jit
def _logit(row, column, num_columns, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr):
    """Read some of a row's logits after temperature; -inf past its end."""
    is_inside = column < num_columns
    logit = tl.load(row + column, mask=is_inside, other=0.0).to(tl.float32)
    if SCALE != 1:
        logit *= SCALE
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right at either end too.
        logit = SOFTCAP * (1.0 - 2.0 / (tl.exp(logit * (2.0 / SOFTCAP)) + 1.0))
    logit = logit / TEMPERATURE
    return tl.where(is_inside, logit, -float("inf"))


@triton.jit
def _cut(logit, is_sampled, low, high, log_share, row):
    """Leave what the support says, and the sampled token; see `shoal.algorithm.truncation.cut_`."""
    tied = logit <= tl.load(high + row)
    left = tl.where(tied, logit + tl.load(log_share + row), logit)
    left = tl.where(logit <= tl.load(low + row), -float("inf"), left)
    return tl.where(is_sampled, logit, left)
