"""Lay sequences end to end as the tensors that one forward pass takes."""

from __future__ import annotations

from collections import abc
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shoal.data.packing import first_fit_decreasing
from shoal.types import MicroBatch, Sequence


def build_micro_batch(sequences: abc.Sequence[Sequence], token_weights: abc.Sequence[float]) -> MicroBatch:
    """Lay sequences end to end, in the order given; see `MicroBatch` for what each tensor holds.

    Args:
        sequences: At least one; each has a prompt of at least one token, which predicts its first completion token.
        token_weights: For each sequence, the weight of each of its targets, the step's denominator included.

    Returns:
        The micro-batch, on the CPU.
    """
    assert sequences, "a micro-batch holds at least one sequence; build_filler makes one that counts for nothing"
    for sequence in sequences:
        _assert_well_formed(sequence)
    lengths = np.array([len(s.token_ids) for s in sequences])
    prompts = np.array([s.prompt_length for s in sequences])
    completions = lengths - prompts
    starts = np.cumsum(lengths) - lengths

    # Targets are counted within their sequence by subtracting where its targets start among all targets.
    index = np.repeat(np.arange(len(sequences)), completions)
    within = np.arange(completions.sum()) - np.repeat(np.cumsum(completions) - completions, completions)
    predictors = (starts + prompts - 1)[index] + within
    is_target = np.concatenate([s.is_target for s in sequences])
    index, predictors = index[is_target], predictors[is_target]
    input_ids = np.concatenate([s.token_ids for s in sequences])
    return MicroBatch(
        input_ids=_tensor(input_ids, np.int64),
        position_ids=_tensor(np.arange(lengths.sum()) - np.repeat(starts, lengths), np.int64),
        predictor_positions=_tensor(predictors, np.int64),
        target_ids=_tensor(input_ids[predictors + 1], np.int64),
        sequence_index=_tensor(index, np.int64),
        num_sequences=len(sequences),
        advantages=_tensor(np.array([s.advantage for s in sequences])[index], np.float32),
        rollout_logprobs=_tensor(np.concatenate([s.rollout_logprobs for s in sequences])[is_target], np.float32),
        loss_weights=_tensor(np.array(token_weights, dtype=np.float64)[index], np.float32),
    )


def build_filler(sequences: abc.Sequence[Sequence]) -> MicroBatch:
    """Build a micro-batch that counts for nothing, for a rank that has none while others still run theirs.

    It is a real sequence of the step, the shortest, so the forward pass does what all others do; its loss is exactly 0.
    """
    return build_micro_batch([min(sequences, key=lambda s: len(s.token_ids))], [0.0])


def pack(sequences: abc.Sequence[Sequence], token_weights: abc.Sequence[float], max_tokens: int) -> list[MicroBatch]:
    """Pack one rank's sequences into micro-batches of at most `max_tokens`; a longer sequence gets one alone.

    Args:
        sequences: What to pack.
        token_weights: For each sequence, the weight of each of its targets.
        max_tokens: Token budget, prompts included.
    """
    plan = first_fit_decreasing([len(s.token_ids) for s in sequences], max_tokens)
    return [build_micro_batch([sequences[i] for i in batch], [token_weights[i] for i in batch]) for batch in plan]


def _assert_well_formed(sequence: Sequence) -> None:
    """Check the lengths that the layout relies on."""
    total, prompt = len(sequence.token_ids), sequence.prompt_length
    assert 1 <= prompt <= total, f"prompt_length {prompt} is not within 1..{total}: a token needs one before it"
    assert len(sequence.rollout_logprobs) == len(sequence.is_target) == total - prompt, (
        f"{len(sequence.rollout_logprobs)} rollout logprobs and {len(sequence.is_target)} marks of who wrote a token "
        f"for {total - prompt} completion tokens"
    )


def _tensor(values: npt.NDArray[Any], dtype: npt.DTypeLike) -> torch.Tensor:
    """Make a tensor that owns its memory."""
    return torch.from_numpy(np.array(values, dtype=dtype))
