"""Cut sequences into what each rank runs: the same number of packed micro-batches everywhere."""

from __future__ import annotations

from collections import abc
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from shoal.algorithm.losses import LOSSES, LossSettings
from shoal.algorithm.objective import CorrectionSettings, ObjectiveSettings
from shoal.algorithm.truncation import Truncation
from shoal.config import GRPOConfig
from shoal.data.micro_batch import build_filler, build_micro_batch
from shoal.data.packing import plan_micro_batches
from shoal.trainer.held_batch import Part, deal
from shoal.types import MicroBatch, Sequence


def micro_batches_of_rank(
    sequences: abc.Sequence[Sequence],
    *,
    loss_type: str,
    rank: int,
    num_ranks: int,
    max_tokens: int,
    skip_zero_advantages: bool = False,
) -> list[MicroBatch]:
    """Return one rank's micro-batches of a step, on the CPU.

    Every rank computes the same division from the same sequences, so nothing needs to be said about it.

    Args:
        sequences: Of the whole step, over all ranks.
        loss_type: A key of `LOSSES`; decides the step's denominator.
        rank: This rank.
        num_ranks: Of all trainer processes.
        max_tokens: Budget of a micro-batch.
        skip_zero_advantages: Whether a sequence is left out whose loss is 0 whatever the policy, as that of an
            advantage of exactly 0 is without a KL term. It still counts in the denominators.
    """
    weights = LOSSES[loss_type].token_weights(
        np.array([sequence.num_targets for sequence in sequences], dtype=np.int64),
        np.array([sequence.in_loss for sequence in sequences], dtype=np.bool_),
    )
    used = [
        index
        for index, sequence in enumerate(sequences)
        if not skip_zero_advantages or (sequence.advantage != 0 and weights[index] != 0)
    ]
    plan = plan_micro_batches([len(sequences[i].token_ids) for i in used], num_ranks, max_tokens)
    return [
        build_micro_batch([sequences[used[i]] for i in indices], [float(weights[used[i]]) for i in indices])
        if indices
        else build_filler(sequences)
        for indices in plan[rank]
    ]


def parts_of_rank(sequences: abc.Sequence[Sequence], args: GRPOConfig, *, number: int, max_tokens: int) -> list[Part]:
    """Return this rank's share of a batch, for each of the optimizer steps that it is divided into.

    Args:
        sequences: Of the whole batch, over all ranks.
        args: The settings.
        number: Of the batch, counted from 0.
        max_tokens: Budget of a micro-batch.
    """
    return [
        Part(
            micro_batches=micro_batches_of_rank(
                share,
                loss_type=args.loss_type,
                rank=args.process_index,
                num_ranks=args.world_size,
                max_tokens=max_tokens,
                skip_zero_advantages=skips_zero_advantages(args),
            ),
            is_empty=not any(sequence.in_loss for sequence in share),
        )
        for share in deal(sequences, args.parts_per_batch, seed=args.seed, number=number)
    ]


def largest_pass(parts: abc.Sequence[Part]) -> int:
    """Return the number of tokens of a batch's largest micro-batch; 0 if it has none."""
    return max((micro_batch.num_tokens for part in parts for micro_batch in part.micro_batches), default=0)


def spread(micro_batches: abc.Sequence[MicroBatch], num_items: int) -> list[list[MicroBatch]]:
    """Share micro-batches among the `gradient_accumulation_steps` calls that transformers makes in a step.

    The last call is the one that synchronises gradients, so it gets at least one; earlier ones may get none.
    """
    empty: list[list[MicroBatch]] = [[] for _ in range(max(0, num_items - len(micro_batches)))]
    chunks = np.array_split(np.arange(len(micro_batches)), min(num_items, len(micro_batches)))
    return empty + [[micro_batches[int(i)] for i in chunk] for chunk in chunks]


def to_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Return the micro-batch with all of its tensors on `device`.

    On a GPU nothing waits: the copies come after what the current stream does, and this thread goes on at once. From
    ordinary memory it could not, and the GPU would idle between micro-batches.
    """

    def move(value: torch.Tensor) -> torch.Tensor:
        is_ordinary = device.type == "cuda" and value.device.type == "cpu"
        return (value.pin_memory() if is_ordinary else value).to(device, non_blocking=True)

    moved: dict[str, Any] = {
        field.name: move(value)
        for field in fields(micro_batch)
        if isinstance(value := getattr(micro_batch, field.name), torch.Tensor)
    }
    return replace(micro_batch, **moved)


def sampling_filters(args: GRPOConfig) -> dict[str, Any]:
    """Return what the settings cut off before sampling, in one form for engines and trainer."""
    return {"top_k": max(args.top_k or 0, 0), "top_p": args.top_p, "min_p": args.min_p or 0.0}


def truncation(args: GRPOConfig) -> Truncation:
    """Return the same for the trainer's logprobs."""
    return Truncation(**sampling_filters(args))


def objective_settings(args: GRPOConfig) -> ObjectiveSettings:
    """Return what the settings say about the loss."""
    return ObjectiveSettings(
        loss_type=args.loss_type,
        loss=LossSettings(
            epsilon=args.epsilon,
            epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
            delta=args.delta,
            importance_sampling_level=args.importance_sampling_level,  # type: ignore[arg-type]
        ),
        beta=args.beta,
        use_bias_correction_kl=args.use_bias_correction_kl,
        correction=CorrectionSettings(
            mode=args.vllm_importance_sampling_mode,  # type: ignore[arg-type]
            clip_min=args.vllm_importance_sampling_clip_min,
            clip_max=args.vllm_importance_sampling_clip_max,
        )
        if args.vllm_importance_sampling_correction
        else None,
        old_from=args.old_logprobs,  # type: ignore[arg-type]
    )


def skips_zero_advantages(args: GRPOConfig) -> bool:
    """Whether completions that can teach nothing are left out of the forward passes."""
    return args.beta == 0 if args.skip_zero_advantages is None else args.skip_zero_advantages
