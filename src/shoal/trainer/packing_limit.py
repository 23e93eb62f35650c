"""How many tokens a micro-batch of this run may have, and what it keeps: found once, by all ranks together."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from shoal.config import GRPOConfig
from shoal.trainer.attention import takes_boundaries
from shoal.trainer.blocks import are_compiled, find_blocks, recompute_first
from shoal.trainer.exchange import Exchange
from shoal.trainer.forward import packs_exactly
from shoal.trainer.token_budget import PassPlan, bytes_to_come, free_gpu_bytes, pass_shape, plan_pass

logger = logging.getLogger(__name__)


class PackingLimit:
    """The token budget of a micro-batch. `find` and `measure` are collectives.

    Args:
        args: The settings.
        exchange: To the other ranks.
    """

    def __init__(self, args: GRPOConfig, exchange: Exchange) -> None:
        self._args = args
        self._exchange = exchange
        self._measures = args.max_tokens_per_micro_batch is None and args.device.type == "cuda"
        self._is_settled = False
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
        """Take, once, the budget that suits every rank's GPU, if it is left to us.

        Where all blocks' activations would not fit beside it, the first ones are computed again in the backward pass;
        the settings may say how many.

        Args:
            model: The unwrapped policy.
            optimizer: Whose states are still to come.
            longest: Tokens of the longest sequence, which has to fit in any case.
            is_fused: Whether logprobs come from hidden states.
        """
        if self._is_settled:
            return
        self._is_settled = True
        recomputed = self._args.recompute_num_layers
        if self._measures:
            plan = self._plan(model, optimizer, longest=longest, is_fused=is_fused)
            plans = self._exchange.gather_json([plan.tokens, plan.recomputed])
            self.tokens = int(min(tokens for tokens, _ in plans))
            recomputed = int(max(recomputed for _, recomputed in plans))
            logger.info("max_tokens_per_micro_batch=%d, from the memory that is free", self.tokens)
        if self._args.gradient_checkpointing and recomputed is not None:
            recompute_first(model, recomputed)
            logger.info("recompute_num_layers=%d of %d", recomputed, len(find_blocks(model)))

    def _plan(self, model: nn.Module, optimizer: Any, *, longest: int, is_fused: bool) -> PassPlan:
        args: Any = self._args
        element_bytes = 2 if args.bf16 or args.fp16 else next(model.parameters()).element_size()
        shape = pass_shape(
            model.config,
            element_bytes=element_bytes,
            checkpointing=args.gradient_checkpointing,
            fused=is_fused,
            has_boundaries=takes_boundaries(model),
            compiled=are_compiled(model),
        )
        free = free_gpu_bytes(args.device) - bytes_to_come(model, optimizer)
        return plan_pass(shape, free, longest=longest, recomputed=args.recompute_num_layers)
