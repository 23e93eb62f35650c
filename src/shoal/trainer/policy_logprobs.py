"""How this run's logprobs are computed: from hidden states if the model's head allows it, else from logits."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from shoal.algorithm.logprobs import TokenLogprobs
from shoal.algorithm.truncation import Truncation
from shoal.data.micro_batch import build_micro_batch
from shoal.errors import ConfigError
from shoal.trainer.attention import takes_boundaries
from shoal.trainer.forward import packed_logprobs, takes_logits_to_keep
from shoal.trainer.logprob_head import HeadRequest, form_of, replace_head
from shoal.trainer.step import to_device
from shoal.types import MicroBatch, Sequence

logger = logging.getLogger(__name__)

_SAME_COMPUTATION = 0.1  # in nats, on average: the rounding of bfloat16 logits stays below, another formula does not


class PolicyLogprobs:
    """Computes the logprobs of packed micro-batches.

    Args:
        policy: The unwrapped model with its adapter; its LM head is replaced by one that behaves the same.
        temperature: The engines'.
        truncation: The engines'.
        fused: Whether logits are to be avoided: None for where it works, True to insist.

    Raises:
        ConfigError: `fused` is True, and the head is not a plain linear layer.
    """

    def __init__(
        self, policy: nn.Module, *, temperature: float, truncation: Truncation | None = None, fused: bool | None = None
    ) -> None:
        self._temperature, self._truncation, self._fused = temperature, truncation, fused
        self._keeps_logits = takes_logits_to_keep(policy)
        self._takes_boundaries = takes_boundaries(policy)
        self._head = None if fused is False else replace_head(policy)
        self._is_decided = self._head is None
        if fused and self._head is None:
            raise ConfigError(
                f"fused_logprobs=True needs an LM head that is a plain linear layer; {type(policy).__name__} has none, "
                "or it is quantised or adapted by LoRA. Unset fused_logprobs, or leave the head out of target_modules."
            )

    @property
    def is_fused(self) -> bool:
        """Whether logprobs are computed without logits, as far as is known."""
        return self._head is not None

    def adapt(self, copy: nn.Module) -> nn.Module:
        """Return another copy of the policy, loaded anew, with its LM head replaced so that it is asked alike."""
        if self._head is not None:
            replace_head(copy, self._head)
        return copy

    def of_policy(self, model: nn.Module, micro_batch: MicroBatch) -> TokenLogprobs:
        """Return logprobs and entropy under the distribution that the engines sample from."""
        return self._of(model, micro_batch, self._truncation)

    def of_reference(self, model: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        """Return the logprobs under a reference model's whole distribution, `[N]`.

        Its part outside of what truncated sampling leaves adds a constant of the context to the KL term, whose
        gradient is that of the KL divergence within.
        """
        return self._of(model, micro_batch, None).logprobs

    def decide(
        self, model: nn.Module, *, vocabulary: int, device: torch.device, all_agree: Callable[[bool], bool]
    ) -> None:
        """Find out once, on the model as it is trained, whether the fused head gives what the logits give.

        Args:
            model: Wrapped; all ranks call it, as the forward passes are collectives.
            vocabulary: Tokens that the model knows.
            device: Of the model.
            all_agree: Whether all ranks say yes; a collective.

        Raises:
            ConfigError: It does not, and `fused` is True.
        """
        if self._is_decided:
            return
        self._is_decided = True
        was_training = model.training
        model.eval()
        try:
            try:
                agrees = self._agrees(model, to_device(_probe(vocabulary), device))
            except (RuntimeError, ValueError, IndexError) as error:
                # What the model does next may not fit what the head answers: the same on all ranks.
                logger.warning("The LM head cannot answer with logprobs: %s", error)
                agrees = False
            agrees = all_agree(agrees)
        finally:
            model.train(was_training)
        if agrees:
            return
        if self._fused:
            raise ConfigError(
                "fused_logprobs=True, but this model does something to its LM head's output that Shoal does not know, "
                "so that logprobs from hidden states differ from those from logits. Unset fused_logprobs."
            )
        logger.warning("Logprobs are computed from logits: this model's LM head is used in a way that is not known.")
        self._head = None

    @torch.no_grad()
    def _agrees(self, model: nn.Module, micro_batch: MicroBatch) -> bool:
        """Compare both computations. Runs the same number of forward passes whatever it finds."""
        head = self._head
        assert head is not None
        with head.asking(HeadRequest(target_ids=None)):
            form = form_of(
                model(
                    input_ids=micro_batch.input_ids[None], position_ids=micro_batch.position_ids[None], use_cache=False
                ).logits
            )
        self._head = None
        expected = self._of(model, micro_batch, None)
        self._head = head
        head.form = form or head.form
        found = self._of(model, micro_batch, None)
        if form is None or found.logprobs.shape != expected.logprobs.shape:
            return False
        gap = (found.logprobs - expected.logprobs).abs() + (found.entropy - expected.entropy).abs()
        return bool(gap.mean() < _SAME_COMPUTATION)

    def _of(self, model: nn.Module, micro_batch: MicroBatch, truncation: Truncation | None) -> TokenLogprobs:
        return packed_logprobs(
            model,
            micro_batch,
            temperature=self._temperature,
            keeps_logits=self._keeps_logits,
            takes_boundaries=self._takes_boundaries,
            truncation=truncation,
            head=self._head,
        )


def _probe(vocabulary: int) -> MicroBatch:
    """Return a few tokens from all over the vocabulary."""
    sequences = [
        Sequence(
            token_ids=np.arange(1, 9, dtype=np.int64) * prime % vocabulary,
            prompt_length=2,
            advantage=0.0,
            rollout_logprobs=np.zeros(6, np.float32),
            in_loss=True,
        )
        for prime in (7919, 104729)
    ]
    return build_micro_batch(sequences, [1.0] * len(sequences))
