"""How many tokens a micro-batch of this run may have, and what it keeps: found once, by all ranks together."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import nn

from shoal.config import GRPOConfig
from shoal.trainer.attention import takes_boundaries
from shoal.trainer.blocks import are_compiled, find_blocks, recompute_first
from shoal.trainer.exchange import Exchange
from shoal.trainer.forward import packs_exactly
from shoal.trainer.token_budget import (
    GpuMemory,
    PassPlan,
    PassUse,
    bytes_to_come,
    improve_plan,
    pass_shape,
    plan_pass,
)

logger = logging.getLogger(__name__)

_TELLING_SHARE = 0.5  # of the budget: what a shorter pass takes says little about one that fills it


class PackingLimit:
    """The token budget of a micro-batch, and how many blocks are computed again. `find` and `measure` are collectives.

    On GPUs, what the settings leave open is estimated from the memory that is free before the first batch. Where that
    has blocks computed again, it is improved by what the passes of later batches have taken, until that gains nothing.

    Args:
        args: The settings.
        exchange: To the other ranks.
        gpu: The memory of this rank's GPU, where there is one.
    """

    def __init__(self, args: GRPOConfig, exchange: Exchange, gpu: GpuMemory) -> None:
        self._args = args
        self._exchange = exchange
        self._gpu = gpu
        self._chooses_recomputed = args.gradient_checkpointing and args.recompute_num_layers is None
        self._measures = args.device.type == "cuda" and (
            args.max_tokens_per_micro_batch is None or self._chooses_recomputed
        )
        self._is_settled = False
        self._has_stepped = False
        self._plan: PassPlan | None = None
        self._use: PassUse | None = None
        self.tokens: int | None = None
        """The budget; None before `find`. 1 leaves one sequence in each micro-batch."""

    def find(self, model: nn.Module, accelerator: Any, *, longest: int, wrapped: nn.Module | None = None) -> None:
        """Try whether the model keeps packed sequences apart, and take the budget that the settings give.

        Args:
            model: The unwrapped policy.
            accelerator: The trainer's.
            longest: Tokens of the longest sequence.
            wrapped: What to call in the policy's place, where ranks hold it in parts.
        """
        with accelerator.autocast():  # some attention works in 16 bits only
            found = packs_exactly(model, wrapped=wrapped, device=self._args.device)
        if self._exchange.json(lambda: found):
            given = self._args.max_tokens_per_micro_batch
            self.tokens = int(given or self._args.per_device_train_batch_size * longest)
            return
        logger.warning(
            "%s lets packed sequences see one another, so each sequence gets a forward pass of its own. "
            "That is right but slow.",
            type(model).__name__,
        )
        self.tokens, self._measures = 1, False

    def measure(self, model: nn.Module, optimizer: Any, *, longest: int, is_fused: bool) -> None:
        """Take, before the passes of a batch, what suits every rank's GPU, as far as it is left to us and not settled.

        Where all blocks' activations would not fit, the first ones are computed again in the backward pass.

        Args:
            model: The unwrapped policy.
            optimizer: Whose states are still to come.
            longest: Tokens of the longest sequence, which has to fit in any case.
            is_fused: Whether logprobs come from hidden states.
        """
        if self._is_settled:
            return
        if not self._measures:
            self._is_settled = True
            if self._args.gradient_checkpointing and self._args.recompute_num_layers is not None:
                count = self._args.recompute_num_layers
                self._recompute(model, count, is_lean=count > 0)
            return
        plan = self._next_plan(model, optimizer, longest=longest, is_fused=is_fused)
        plans = self._exchange.gather_json(None if plan is None else [plan.tokens, plan.recomputed, plan.is_lean])
        if None in plans:  # the passes of some rank have told nothing yet
            return
        tokens, recomputed, lean = zip(*plans, strict=True)
        agreed = PassPlan(tokens=min(tokens), recomputed=max(recomputed), is_lean=any(lean))
        before, self._plan, self._use = self._plan, agreed, None
        gains = before is None or agreed.tokens > before.tokens or agreed.recomputed < before.recomputed
        self._is_settled = not (self._chooses_recomputed and agreed.recomputed and gains)
        if agreed == before:
            return
        if self._args.max_tokens_per_micro_batch is None:
            self.tokens = agreed.tokens
            logger.info("max_tokens_per_micro_batch=%d, from the memory that is free", agreed.tokens)
        if self._args.gradient_checkpointing:
            self._recompute(model, agreed.recomputed, is_lean=agreed.is_lean)

    def watch(self, model: nn.Module, *, largest: int) -> None:
        """Look at what the passes of a batch take of the GPU's memory, if that may still change what `measure` takes.

        Args:
            model: The unwrapped policy, gradients freed.
            largest: Tokens of the largest pass to come.
        """
        # The first step's optimizer makes its states, which must not be taken for a pass's.
        if self._has_stepped and not self._is_settled:
            self._gpu.watch()
            self._use = PassUse(
                tokens=largest, free_bytes=self._gpu.free(), used_bytes=0, gradient_bytes=bytes_to_come(model, None)
            )

    def end_step(self) -> None:
        """Note what an optimizer step has taken, before anything else takes memory."""
        self._has_stepped = True
        if self._use is not None:
            self._use = replace(self._use, used_bytes=max(self._use.used_bytes, self._gpu.taken()))

    def _next_plan(self, model: nn.Module, optimizer: Any, *, longest: int, is_fused: bool) -> PassPlan | None:
        """Return what this rank's GPU would suit: by estimate, then by what was seen, if enough was."""
        args: Any = self._args
        shape = pass_shape(
            model.config,
            element_bytes=2 if args.bf16 or args.fp16 else next(model.parameters()).element_size(),
            checkpointing=args.gradient_checkpointing,
            fused=is_fused,
            has_boundaries=takes_boundaries(model),
            compiled=are_compiled(model),
        )
        tokens = args.max_tokens_per_micro_batch
        if self._plan is None:
            free = self._gpu.free() - bytes_to_come(model, optimizer)
            return plan_pass(shape, free, longest=longest, tokens=tokens, recomputed=args.recompute_num_layers)
        use = self._use
        if use is None or not use.used_bytes or use.tokens < _TELLING_SHARE * self._plan.tokens:
            return None
        return improve_plan(self._plan, shape, use, longest=longest, may_grow=tokens is None)

    def _recompute(self, model: nn.Module, count: int, *, is_lean: bool) -> None:
        recompute_first(model, count, is_lean=is_lean)
        logger.info("recompute_num_layers=%d of %d", count, len(find_blocks(model)))
