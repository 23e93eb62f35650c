"""How many tokens a packed forward and backward pass may have, from the memory that is free on this rank's GPU.

An estimate by the shapes of any model, meant to be safe rather than sharp: what is not counted (allocator fragments,
workspaces, MoE routing) has to fit into the share that is left. `placement/trainer_memory.py` is the sharp one, of the
families that it knows.
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
        num_blocks: Blocks that may be computed again or kept.
    """

    per_token_bytes: int
    per_pair_bytes: int
    fixed_bytes: int
    kept_bytes: int = 0
    num_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPlan:
    """How the passes are run.

    Attributes:
        tokens: Most of one pass.
        recomputed: Blocks that are computed again in the backward pass.
    """

    tokens: int
    recomputed: int


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
    block = int(_WITH_GRADIENTS * (saved + residuals))
    blocks = layers * 4 * hidden + block if checkpointing else layers * (saved + residuals) + block
    head_bytes = 4 * hidden + 2 * element_bytes * hidden
    logits = 0 if fused else 2 * element_bytes * int(config.vocab_size)
    return PassShape(
        per_token_bytes=blocks + head_bytes + logits,
        per_pair_bytes=0 if has_boundaries else 1 + element_bytes,
        kept_bytes=saved + residuals - 4 * hidden if checkpointing else 0,
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


def plan_pass(shape: PassShape, free_bytes: int, *, longest: int, recomputed: int | None = None) -> PassPlan:
    """Divide memory between tokens of a pass and activations that are kept.

    As many tokens as make a pass efficient come first, then as many kept blocks as fit; if all do, more tokens.

    Args:
        shape: Of the passes.
        free_bytes: Of this rank's GPU.
        longest: Tokens of the longest sequence, which has to fit in any case.
        recomputed: Blocks that are to be computed again; None to choose.
    """
    if recomputed is None:
        enough = max(longest, min(tokens_that_fit(shape, free_bytes), ENOUGH_TOKENS))
        used = shape.fixed_bytes + shape.per_token_bytes * enough + shape.per_pair_bytes * enough**2
        room = max(0.0, _USED_SHARE * free_bytes - used)
        recomputed = max(0, shape.num_blocks - int(room // max(1, shape.kept_bytes * enough)))
    kept = max(0, shape.num_blocks - recomputed)
    with_kept = replace(shape, per_token_bytes=shape.per_token_bytes + shape.kept_bytes * kept)
    return PassPlan(tokens=max(tokens_that_fit(with_kept, free_bytes), longest), recomputed=shape.num_blocks - kept)


def bytes_to_come(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Return what training will allocate and keep: gradients, and an Adam's moments. Counts this rank's shards."""
    trained = [value for value in model.parameters() if value.requires_grad]
    gradients = sum(_local_bytes(value) for value in trained if value.grad is None)
    has_state = optimizer is None or bool(getattr(optimizer, "state", None))
    return gradients + (0 if has_state else _ADAM_MOMENTS * sum(map(_local_bytes, trained)))


def free_gpu_bytes(device: torch.device) -> int:
    """Return what this process can still take of the GPU: what nobody has, and what its allocator keeps unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _local_bytes(value: Any) -> int:
    local = getattr(value, "_local_tensor", value)  # a DTensor's shard
    return int(local.numel() * local.element_size())
