"""How many tokens a packed forward and backward pass may have, from the memory that is free on this rank's GPU.

First an estimate by the shapes of any model, meant to be safe rather than sharp: what is not counted (allocator
fragments, workspaces, MoE routing) has to fit into the share that is left. `placement/trainer_memory.py` is the sharp
one, of the families that it knows. Once passes have run, what they took takes the estimate's place (`improve_plan`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shoal.algorithm.lm_head import MAX_TILE_ELEMENTS
from shoal.placement.step_time import ENOUGH_TOKENS

_USED_SHARE = 0.7
_MEASURED_SHARE = 0.85  # the rest is for the allocator's fragments, and for what is taken now and then
_ADAM_MOMENTS = 2
# A block's tensors that are saved for its backward pass, times this for the gradients that live beside them.
_WITH_GRADIENTS = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PassShape:
    """What a pass costs.

    Attributes:
        per_token_bytes: For each token.
        per_pair_bytes: For each pair of tokens: the block mask of SDPA. 0 with variable-length attention.
        fixed_bytes: Whatever the number of tokens.
        kept_bytes: For each token, what keeping one block's activations takes beyond its input; 0 if all are kept.
        lean_bytes: The same of a block that makes what is cheap again (`recompute_first`).
        num_blocks: Blocks that may be computed again or kept.
    """

    per_token_bytes: int
    per_pair_bytes: int
    fixed_bytes: int
    kept_bytes: int = 0
    lean_bytes: int = 0
    num_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPlan:
    """How the passes are run.

    Attributes:
        tokens: Most of one pass.
        recomputed: Blocks that are computed again in the backward pass.
        is_lean: Whether the others keep less (`recompute_first`).
    """

    tokens: int
    recomputed: int
    is_lean: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PassUse:
    """What passes were seen to take of this rank's GPU.

    Attributes:
        tokens: Of the largest.
        free_bytes: What was free before them.
        used_bytes: The most that was taken of it.
        gradient_bytes: Of these, for the gradients that are added up from pass to pass.
    """

    tokens: int
    free_bytes: int
    used_bytes: int
    gradient_bytes: int


class GpuMemory:
    """The memory of this rank's GPU, as torch's allocator sees it.

    Args:
        device: The GPU. On a CPU nothing may be asked.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def free(self) -> int:
        """Return the bytes that this process can still take: what nobody has, and what its allocator keeps unused."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device))

    def watch(self) -> None:
        """Begin to look for the most that is taken."""
        self._before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def taken(self) -> int:
        """Return the most bytes that were taken since, beyond what was there."""
        return int(torch.cuda.max_memory_allocated(self._device)) - self._before


def pass_shape(
    config: Any, *, element_bytes: int, checkpointing: bool, fused: bool, has_boundaries: bool, compiled: bool
) -> PassShape:
    """Estimate what a pass costs.

    Args:
        config: The model's.
        element_bytes: Of what matrix products compute in: 2 under autocast.
        checkpointing: Whether only each block's input is kept.
        fused: Whether logprobs come from hidden states.
        has_boundaries: Whether attention is told where sequences begin.
        compiled: Whether blocks are, which then keep less.
    """
    config = config.get_text_config()
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    heads = int(config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or hidden // heads)
    keys = int(getattr(config, "num_key_value_heads", None) or heads)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    experts = int(getattr(config, "num_experts_per_tok", None) or 0)
    if experts:
        inner = experts * int(getattr(config, "moe_intermediate_size", None) or inner)
    # Inputs of products: the two norms' outputs, queries, keys, values, attention's output, gate, up, their product.
    saved = element_bytes * (2 * hidden + 2 * heads * head + 2 * keys * head + 4 * inner)
    # In float32: the stream before and after attention, and what the norms keep; uncompiled, their every operation's.
    residuals = 4 * (4 if compiled else 10) * hidden
    cheap = element_bytes * (2 * hidden + inner) if compiled else 0  # of these, the norms' outputs and the product
    block = int(_WITH_GRADIENTS * (saved + residuals))
    blocks = layers * 4 * hidden + block if checkpointing else layers * (saved + residuals) + block
    head_bytes = 4 * hidden + 2 * element_bytes * hidden
    logits = 0 if fused else 2 * element_bytes * int(config.vocab_size)
    return PassShape(
        per_token_bytes=blocks + head_bytes + logits,
        per_pair_bytes=0 if has_boundaries else 1 + element_bytes,
        kept_bytes=saved + residuals - 4 * hidden if checkpointing else 0,
        lean_bytes=saved + residuals - cheap - 4 * hidden if checkpointing else 0,
        num_blocks=layers if checkpointing else 0,
        fixed_bytes=4 * (5 * MAX_TILE_ELEMENTS + hidden * math.isqrt(MAX_TILE_ELEMENTS)),
    )


def tokens_that_fit(shape: PassShape, free_bytes: int) -> int:
    """Return how many tokens a pass may have in so much memory; 0 if none fits."""
    room = _USED_SHARE * free_bytes - shape.fixed_bytes
    if room <= 0:
        return 0
    linear, square = shape.per_token_bytes, shape.per_pair_bytes
    if not square:
        return int(room // linear)
    # The positive root of square * t^2 + linear * t = room.
    return int((math.sqrt(linear**2 + 4 * square * room) - linear) / (2 * square))


def plan_pass(
    shape: PassShape, free_bytes: int, *, longest: int, tokens: int | None = None, recomputed: int | None = None
) -> PassPlan:
    """Divide memory between tokens of a pass and activations that are kept.

    As many tokens as make a pass efficient come first, then as many kept blocks as fit; if all do, more tokens.

    Args:
        shape: Of the passes.
        free_bytes: Of this rank's GPU.
        longest: Tokens of the longest sequence, which has to fit in any case.
        tokens: Budget of a pass; None to choose.
        recomputed: Blocks that are to be computed again; None to choose.
    """
    is_lean = recomputed != 0
    if recomputed is None:
        enough = max(longest, tokens or min(tokens_that_fit(shape, free_bytes), ENOUGH_TOKENS))
        room = max(0.0, _USED_SHARE * free_bytes - _cost(shape, enough))
        is_lean = room < shape.num_blocks * shape.kept_bytes * enough
        recomputed = shape.num_blocks - int(room // max(1, shape.lean_bytes * enough)) if is_lean else 0
    recomputed = min(shape.num_blocks, max(0, recomputed))
    fitting = tokens_that_fit(_with_kept(shape, recomputed, is_lean=is_lean), free_bytes)
    return PassPlan(tokens=tokens or max(fitting, longest), recomputed=recomputed, is_lean=is_lean)


def improve_plan(plan: PassPlan, shape: PassShape, use: PassUse, *, longest: int, may_grow: bool) -> PassPlan:
    """Spend what passes left of the memory, or take back what they took too much.

    Passes that are too short to be efficient grow first; in others, more blocks keep their activations. A kept block is
    counted as estimated, or as much dearer as the whole pass was: what is gained is certain, and may be less than there
    is. So this is worth repeating while it gains something.

    Args:
        plan: By which the passes ran.
        shape: Of the passes.
        use: What they took.
        longest: Tokens of the longest sequence.
        may_grow: Whether the number of tokens is ours to choose.
    """
    room = _MEASURED_SHARE * use.free_bytes
    largest = max(plan.tokens, longest)
    taken = use.used_bytes * largest / use.tokens
    enough = max(longest, ENOUGH_TOKENS)
    if may_grow and plan.tokens < enough and taken < room and not shape.per_pair_bytes:
        return replace(plan, tokens=min(enough, int(plan.tokens * room / taken)))
    expected = _cost(_with_kept(shape, plan.recomputed, is_lean=plan.is_lean), use.tokens)
    dearer = max(1.0, (use.used_bytes - use.gradient_bytes) / expected)
    more = math.floor((room - taken) / (dearer * _block_bytes(shape, is_lean=plan.is_lean) * largest))
    return replace(plan, recomputed=min(shape.num_blocks, max(0, plan.recomputed - more)))


def _cost(shape: PassShape, tokens: int) -> int:
    return shape.fixed_bytes + shape.per_token_bytes * tokens + shape.per_pair_bytes * tokens**2


def _with_kept(shape: PassShape, recomputed: int, *, is_lean: bool) -> PassShape:
    """Return the shape of passes of which all blocks but so many keep their activations."""
    kept = _block_bytes(shape, is_lean=is_lean) * (shape.num_blocks - recomputed)
    return replace(shape, per_token_bytes=shape.per_token_bytes + kept)


def _block_bytes(shape: PassShape, *, is_lean: bool) -> int:
    return shape.lean_bytes if is_lean else shape.kept_bytes


def bytes_to_come(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Return what training will allocate and keep: gradients, and an Adam's moments. Counts this rank's shards."""
    trained = [value for value in model.parameters() if value.requires_grad]
    gradients = sum(_local_bytes(value) for value in trained if value.grad is None)
    has_state = optimizer is None or bool(getattr(optimizer, "state", None))
    return gradients + (0 if has_state else _ADAM_MOMENTS * sum(map(_local_bytes, trained)))


def _local_bytes(value: Any) -> int:
    local = getattr(value, "_local_tensor", value)  # a DTensor's shard
    return int(local.numel() * local.element_size())
