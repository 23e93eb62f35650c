"""One frozen record per stage of a step: prompt, rollout, scored group, sequence, micro-batch.

Shape letters used throughout: P prompts, K completions per prompt, T tokens of a packed micro-batch,
N tokens of a micro-batch that the policy wrote, S sequences of a micro-batch, F reward functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Message: TypeAlias = dict[str, Any]
"""One chat message, `{"role": ..., "content": ...}`, as in the Hugging Face chat format."""

PromptLike: TypeAlias = str | list[Message]
"""What a dataset's `prompt` column may hold: text, or a conversation."""

CompletionLike: TypeAlias = str | list[Message]
"""What reward functions receive: text for text prompts, one assistant message for conversations."""

FinishReason: TypeAlias = Literal["stop", "length", "cut"]
"""Why a completion ended. `"cut"`: its engine was told to hand it over unfinished; never reaches training."""

UNPROVEN = -1
"""Weight version of an engine that holds nothing that was proven."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the dataset, ready to be sent to an engine.

    Attributes:
        row: Index of the row in the dataset.
        prompt: The `prompt` column as the user wrote it; reward functions see this.
        token_ids: The prompt as token ids, chat template applied.
        columns: All other columns of the row, handed to reward functions by name.
    """

    row: int
    prompt: PromptLike
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How an engine is to sample; the same for every completion of a step.

    Attributes:
        temperature: Softmax temperature; 0 is greedy.
        max_tokens: Most tokens of a completion.
        stop_token_ids: Tokens that end a completion (they stay part of it). Empty: it ends at `max_tokens` only.
        top_k: Only the so many most likely tokens are sampled from; 0 for all.
        top_p: Of those, only the most likely ones that together reach this probability.
        min_p: Before either, only those of at least this share of the most likely token's probability.
    """

    temperature: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One completion that an engine is asked for.

    Attributes:
        prompt_token_ids: The prompt as token ids.
        seed: Seed of this sample alone, derived from (run seed, step, prompt, sample).
        sampling: How to sample.
        name: By which it can be cut; no other request of its time has it. Empty: it cannot be.
    """

    prompt_token_ids: tuple[int, ...]
    seed: int
    sampling: SamplingSettings
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One completion as an engine wrote it.

    Attributes:
        token_ids: `[tokens]` int32, the stop token included when there is one.
        rollout_logprobs: `[tokens]` float32, the engine's logprob of each sampled token (after temperature).
        finish_reason: `"stop"` at a stop token, `"length"` at `max_tokens` or the context's end.
        weight_version: Version of the weights that wrote it; the oldest of several.
        engine: Name of the engine that wrote it; the last of several.
        by_policy: `[tokens]` bool, False for what an environment wrote into a conversation, whose logprobs are 0; None
            if the policy wrote all of it.
    """

    token_ids: npt.NDArray[np.int32]
    rollout_logprobs: npt.NDArray[np.float32]
    finish_reason: FinishReason
    weight_version: int
    engine: str
    by_policy: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """What an engine says of itself at some moment.

    Attributes:
        running: Completions it is writing, whoever asked for them.
        waiting: Requests that it has not begun, or has put off for lack of memory.
        kv_usage: Share of its KV cache in use, 0 to 1.
        num_preemptions: How often it has put off a completion that it had begun, since it started.
        num_tokens: Tokens that it has read and written since it started; None if it does not say.
    """

    running: int
    waiting: int
    kv_usage: float = 0.0
    num_preemptions: int = 0
    num_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFailure:
    """A call of a reward function that did not give every sample of a group a reward or `None`.

    Attributes:
        function: Name of the function.
        kind: `"timeout"` if it did not answer in time, `"error"` for anything else.
        samples: The samples, of 0 to K - 1, that have no reward for it.
        message: What happened, as an error would say it.
    """

    function: str
    kind: Literal["error", "timeout"]
    samples: tuple[int, ...]
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """All completions of one prompt, with their rewards.

    Attributes:
        prompt: The prompt.
        rollouts: The K completions.
        completions: The K completions as the reward functions saw them.
        rewards: `[K, F]` float64, one column per reward function; NaN where a function answered `None`, or failed.
        extras: Columns that reward functions added with `log_extra`, each of length K.
        failures: Calls that failed; always empty with `reward_on_error="raise"`.
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    completions: tuple[CompletionLike, ...]
    rewards: npt.NDArray[np.float64]
    extras: Mapping[str, tuple[Any, ...]]
    failures: tuple[RewardFailure, ...] = ()

    @property
    def dropped(self) -> npt.NDArray[np.bool_]:
        """`[K]`, whether a sample is left out of the step because a function failed on it.

        A lone sample that would remain is left out too: there is nothing to compare it with.
        """
        failed = {sample for failure in self.failures for sample in failure.samples}
        if failed and len(self.rollouts) - len(failed) < 2:
            failed = set(range(len(self.rollouts)))
        return np.array([sample in failed for sample in range(len(self.rollouts))], dtype=np.bool_)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """One prompt with one completion, ready to be packed.

    Attributes:
        token_ids: `[tokens]` int64, prompt and completion.
        prompt_length: How many of them are the prompt (at least 1).
        advantage: The completion's advantage.
        rollout_logprobs: `[tokens - prompt_length]` float32.
        in_loss: Whether the completion counts in the loss and in its denominators
            (`mask_truncated_completions` sets it to False for completions cut by length).
        by_policy: `[tokens - prompt_length]` bool, as in `Rollout`; None if the policy wrote the whole completion.
    """

    token_ids: npt.NDArray[np.int64]
    prompt_length: int
    advantage: float
    rollout_logprobs: npt.NDArray[np.float32]
    in_loss: bool
    by_policy: npt.NDArray[np.bool_] | None = None

    @property
    def completion_length(self) -> int:
        """Number of completion tokens."""
        return len(self.token_ids) - self.prompt_length

    @property
    def is_target(self) -> npt.NDArray[np.bool_]:
        """`[tokens - prompt_length]` bool, the tokens that the policy wrote: those that the loss is about."""
        return np.ones(self.completion_length, dtype=np.bool_) if self.by_policy is None else self.by_policy

    @property
    def num_targets(self) -> int:
        """Number of completion tokens that the policy wrote."""
        return int(self.is_target.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Whole sequences laid end to end, with no padding: what one forward pass takes.

    The logits at `predictor_positions[n]` predict `target_ids[n]`; every token that the policy wrote is a target, no
    token of a prompt or of an environment is. The loss is `sum_n loss_weights[n] * token_loss[n]`: the weights carry
    the one denominator of the whole step, over all micro-batches and ranks, so the gradient does not depend on how the
    step was cut.

    Attributes:
        input_ids: `[T]` int64.
        position_ids: `[T]` int64, from 0 in each sequence.
        predictor_positions: `[N]` int64, indices into the T tokens.
        target_ids: `[N]` int64.
        sequence_index: `[N]` int64, in `[0, num_sequences)`: the sequence that a target belongs to.
        num_sequences: S.
        advantages: `[N]` float32.
        rollout_logprobs: `[N]` float32.
        loss_weights: `[N]` float32, 0 for tokens that do not count.
        old_logprobs: `[N]` float32, the trainer's before any update on the batch; None before there was one.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predictor_positions: torch.Tensor
    target_ids: torch.Tensor
    sequence_index: torch.Tensor
    num_sequences: int
    advantages: torch.Tensor
    rollout_logprobs: torch.Tensor
    loss_weights: torch.Tensor
    old_logprobs: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Number of packed tokens, T."""
        return int(self.input_ids.numel())


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterMeta:
    """Name, type and full shape of one parameter of a checkpoint.

    Attributes:
        name: The name under which the checkpoint has it.
        dtype: The type's name without the module, such as `"bfloat16"`.
        shape: The full (unsharded) shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements of the full parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, order=True)
class Interval:
    """A run of a flattened parameter's elements: `start` to `stop`, the latter not included."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def overlap(self, other: Interval) -> Interval:
        """Return what both contain; of size 0 or less where that is nothing."""
        return Interval(max(self.start, other.start), min(self.stop, other.stop))


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """What one publish of weights did.

    Attributes:
        version: The version that every engine now holds.
        num_workers: Workers that proved it.
        num_digests: Digests compared, over all workers.
        num_bytes: Sent, over all trainer ranks and engines.
        lost: Engines that failed and have left, and why.
        seconds: Wall time from the call to the last engine's resumption.
        phases: What they went to, on this rank: `"wake"` (of engines that sleep), `"pause"`, `"wire"` (from the first
            tensor loaded to the last one in its place, digests included), `"prove"` (fetching and comparing them) and
            `"resume"`. Ranks other than 0 count all the waiting for the engines as `"prove"`.
    """

    version: int
    num_workers: int
    num_digests: int
    num_bytes: int
    lost: Mapping[str, str]
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)
