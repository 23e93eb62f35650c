"""Collect what the objective logs as sums, counts and extremes, which micro-batches and ranks can add up exactly."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, fields

import torch

_MINS = ("ratio_min",)
_MAXS = ("logprob_difference_max", "ratio_max")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveMetrics:
    """Totals over the tokens in the loss; every field is a 0-d float64 tensor on the device of the loss.

    They stay on the device so that no micro-batch waits for the GPU. A field ending in `_min` (`_max`) of nothing is
    +inf (-inf).

    Attributes:
        entropy_sum, num_entropies: Entropy of the policy at each token, when it was given.
        kl_sum, num_kls: The KL term of each token, when there is one.
        clip_low_sum, clip_high_sum, num_clips: Ratios clipped at either bound, of how many. At sequence level, one per
            sequence.
        logprob_difference_sum, logprob_difference_max, num_logprob_differences: |trainer - engine| per token, where
            the engine gave a logprob.
        ratio_sum, ratio_min, ratio_max, num_ratios: The correction ratio, when it is applied. In the sequence modes,
            one per sequence.
    """

    entropy_sum: torch.Tensor
    num_entropies: torch.Tensor
    kl_sum: torch.Tensor
    num_kls: torch.Tensor
    clip_low_sum: torch.Tensor
    clip_high_sum: torch.Tensor
    num_clips: torch.Tensor
    logprob_difference_sum: torch.Tensor
    logprob_difference_max: torch.Tensor
    num_logprob_differences: torch.Tensor
    ratio_sum: torch.Tensor
    ratio_min: torch.Tensor
    ratio_max: torch.Tensor
    num_ratios: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMetrics:
    """The same numbers as three flat tensors, one for each kind of all-reduce.

    Attributes:
        sums: `[11]` float64, to be summed over ranks.
        mins: `[1]` float64, to be reduced with min.
        maxs: `[2]` float64, to be reduced with max.
    """

    sums: torch.Tensor
    mins: torch.Tensor
    maxs: torch.Tensor


def merge_metrics(parts: abc.Sequence[ObjectiveMetrics]) -> ObjectiveMetrics:
    """Add up the metrics of several micro-batches, at least one."""
    packed = [pack_metrics(part) for part in parts]
    return unpack_metrics(
        PackedMetrics(
            sums=torch.stack([part.sums for part in packed]).sum(dim=0),
            mins=torch.stack([part.mins for part in packed]).amin(dim=0),
            maxs=torch.stack([part.maxs for part in packed]).amax(dim=0),
        )
    )


def pack_metrics(metrics: ObjectiveMetrics) -> PackedMetrics:
    """Lay the metrics out in three flat tensors."""
    return PackedMetrics(
        sums=torch.stack([getattr(metrics, name) for name in _sum_names()]),
        mins=torch.stack([getattr(metrics, name) for name in _MINS]),
        maxs=torch.stack([getattr(metrics, name) for name in _MAXS]),
    )


def unpack_metrics(packed: PackedMetrics) -> ObjectiveMetrics:
    """Undo `pack_metrics`."""
    return ObjectiveMetrics(
        **dict(zip(_sum_names(), packed.sums.unbind(), strict=True)),
        **dict(zip(_MINS, packed.mins.unbind(), strict=True)),
        **dict(zip(_MAXS, packed.maxs.unbind(), strict=True)),
    )


def named_metrics(metrics: ObjectiveMetrics) -> dict[str, float]:
    """Give the metrics TRL's names, as means where they are means. What was not measured is left out.

    This waits for the device: call it once a step, on the merged and reduced metrics.
    """
    packed = pack_metrics(metrics)
    value = dict(
        zip(
            (*_sum_names(), *_MINS, *_MAXS),
            torch.cat([packed.sums, packed.mins, packed.maxs]).tolist(),
            strict=True,
        )
    )
    named: dict[str, float] = {}
    if count := value["num_entropies"]:
        named["entropy"] = value["entropy_sum"] / count
    if count := value["num_kls"]:
        named["kl"] = value["kl_sum"] / count
    if count := value["num_clips"]:
        named["clip_ratio/low_mean"] = value["clip_low_sum"] / count
        named["clip_ratio/high_mean"] = value["clip_high_sum"] / count
        # A ratio is beyond one bound only, so the two never count the same token.
        named["clip_ratio/region_mean"] = (value["clip_low_sum"] + value["clip_high_sum"]) / count
    if count := value["num_logprob_differences"]:
        named["sampling/sampling_logp_difference/mean"] = value["logprob_difference_sum"] / count
        named["sampling/sampling_logp_difference/max"] = value["logprob_difference_max"]
    if count := value["num_ratios"]:
        named["sampling/importance_sampling_ratio/min"] = value["ratio_min"]
        named["sampling/importance_sampling_ratio/mean"] = value["ratio_sum"] / count
        named["sampling/importance_sampling_ratio/max"] = value["ratio_max"]
    return named


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum `[N]` values where the `[N]` mask is set: 0-d float64. What is masked out may be NaN."""
    return torch.where(mask, values.detach().double(), 0.0).sum()


def masked_min(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Give the smallest of the `[N]` values where the mask is set: 0-d float64, +inf when it is nowhere."""
    infinity = values.new_full((1,), torch.inf, dtype=torch.float64)
    return torch.cat([torch.where(mask, values.detach().double(), torch.inf), infinity]).amin()


def masked_max(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Give the largest of the `[N]` values where the mask is set: 0-d float64, -inf when it is nowhere."""
    return -masked_min(-values, mask)


def _sum_names() -> tuple[str, ...]:
    """Name the fields that add up, in the order in which they are packed."""
    return tuple(f.name for f in fields(ObjectiveMetrics) if f.name not in (*_MINS, *_MAXS))
