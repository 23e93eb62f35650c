"""How many tokens a micro-batch of this run may have: found once, by all ranks together."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from shoal.config import GRPOConfig
from shoal.trainer.attention import takes_boundaries
from shoal.trainer.exchange import Exchange
from shoal.trainer.forward import packs_exactly
from shoal.trainer.token_budget import bytes_to_come, free_gpu_bytes, pass_shape, tokens_that_fit

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
        """Take, once, the largest budget that fits every rank's GPU, if it is left to us.

        Args:
            model: The unwrapped policy.
            optimizer: Whose states are still to come.
            longest: Tokens of the longest sequence, which has to fit in any case.
            is_fused: Whether logprobs come from hidden states.
        """
        if not self._measures:
            return
        self._measures = False
        element_bytes = 2 if self._args.bf16 or self._args.fp16 else next(model.parameters()).element_size()
        shape = pass_shape(
            model.config,
            element_bytes=element_bytes,
            checkpointing=self._args.gradient_checkpointing,
            fused=is_fused,
            has_boundaries=takes_boundaries(model),
        )
        free = free_gpu_bytes(self._args.device) - bytes_to_come(model, optimizer)
        self.tokens = max(int(min(self._exchange.gather_json(tokens_that_fit(shape, free)))), longest)
        logger.info("max_tokens_per_micro_batch=%d, from the memory that is free", self.tokens)
