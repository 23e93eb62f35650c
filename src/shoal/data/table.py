"""Hold a step's sequences as a few flat tensors, so that ranks exchange tensors and never pickles."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import numpy as np
import torch

from shoal.types import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSizes:
    """All that a rank must know to make room for a table.

    Attributes:
        num_sequences: S.
        num_tokens: Tokens of all sequences, prompts included.
        num_completion_tokens: Those of completions.
    """

    num_sequences: int
    num_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTable:
    """Sequences laid end to end.

    Attributes:
        token_ids: `[num_tokens]` int32.
        lengths: `[S]` int32, prompt and completion.
        prompt_lengths: `[S]` int32.
        advantages: `[S]` float64.
        rollout_logprobs: `[num_completion_tokens]` float32.
        in_loss: `[S]` bool.
        by_policy: `[num_completion_tokens]` bool.
    """

    token_ids: torch.Tensor
    lengths: torch.Tensor
    prompt_lengths: torch.Tensor
    advantages: torch.Tensor
    rollout_logprobs: torch.Tensor
    in_loss: torch.Tensor
    by_policy: torch.Tensor

    @property
    def sizes(self) -> TableSizes:
        """Sizes of the table."""
        return TableSizes(
            num_sequences=self.lengths.numel(),
            num_tokens=self.token_ids.numel(),
            num_completion_tokens=self.rollout_logprobs.numel(),
        )

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, in the order in which ranks exchange them."""
        return (
            self.token_ids,
            self.lengths,
            self.prompt_lengths,
            self.advantages,
            self.rollout_logprobs,
            self.in_loss,
            self.by_policy,
        )


def table_from_sequences(sequences: abc.Sequence[Sequence]) -> SequenceTable:
    """Lay sequences end to end, on the CPU. No vocabulary comes near the end of int32."""
    token_ids = [s.token_ids for s in sequences]
    logprobs = [s.rollout_logprobs for s in sequences]
    return SequenceTable(
        token_ids=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *token_ids]).astype(np.int32)),
        lengths=torch.tensor([len(ids) for ids in token_ids], dtype=torch.int32),
        prompt_lengths=torch.tensor([s.prompt_length for s in sequences], dtype=torch.int32),
        advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float64),
        rollout_logprobs=torch.from_numpy(np.concatenate([np.empty(0, np.float32), *logprobs])),
        in_loss=torch.tensor([s.in_loss for s in sequences], dtype=torch.bool),
        by_policy=torch.from_numpy(np.concatenate([np.empty(0, np.bool_), *(s.is_target for s in sequences)])),
    )


def empty_table(sizes: TableSizes) -> SequenceTable:
    """Make room for a table of these sizes, contents undefined, to be received into."""
    num_sequences = sizes.num_sequences
    return SequenceTable(
        token_ids=torch.empty(sizes.num_tokens, dtype=torch.int32),
        lengths=torch.empty(num_sequences, dtype=torch.int32),
        prompt_lengths=torch.empty(num_sequences, dtype=torch.int32),
        advantages=torch.empty(num_sequences, dtype=torch.float64),
        rollout_logprobs=torch.empty(sizes.num_completion_tokens, dtype=torch.float32),
        in_loss=torch.empty(num_sequences, dtype=torch.bool),
        by_policy=torch.empty(sizes.num_completion_tokens, dtype=torch.bool),
    )


def sequences_from_table(table: SequenceTable) -> list[Sequence]:
    """Undo `table_from_sequences`, exactly; marks of who wrote what are left out where the policy wrote all."""
    lengths = table.lengths.numpy().astype(np.int64)
    prompt_lengths = table.prompt_lengths.numpy().astype(np.int64)
    token_ids = np.split(table.token_ids.numpy().astype(np.int64), np.cumsum(lengths)[:-1])
    ends = np.cumsum(lengths - prompt_lengths)[:-1]
    logprobs = np.split(table.rollout_logprobs.numpy(), ends)
    by_policy = np.split(table.by_policy.numpy(), ends)
    return [
        Sequence(
            token_ids=token_ids[i],
            prompt_length=int(prompt_lengths[i]),
            advantage=advantage,
            rollout_logprobs=logprobs[i],
            in_loss=in_loss,
            by_policy=None if by_policy[i].all() else by_policy[i],
        )
        for i, (advantage, in_loss) in enumerate(zip(table.advantages.tolist(), table.in_loss.tolist(), strict=True))
    ]
