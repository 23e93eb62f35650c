"""One forward pass over a packed micro-batch, and the logprobs of its completion tokens."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from shoal.algorithm.logprobs import TokenLogprobs, token_logprobs
from shoal.types import MicroBatch


def packed_logprobs(
    model: nn.Module, micro_batch: MicroBatch, *, temperature: float, keeps_logits: bool
) -> TokenLogprobs:
    """Return the policy's logprob and entropy at each completion token.

    Position ids that start again at 0 and no attention mask are how transformers is told that sequences are packed:
    it then masks attention between them (`find_packed_sequence_indices` in its masking_utils; flash attention takes
    the boundaries from the same position ids).

    Args:
        model: A causal language model, wrapped or not.
        micro_batch: On the model's device.
        temperature: By which logits are divided, as in the engine.
        keeps_logits: Whether the model takes `logits_to_keep`, see `takes_logits_to_keep`.
    """
    keywords: dict[str, Any] = {"logits_to_keep": micro_batch.predictor_positions} if keeps_logits else {}
    output = model(
        input_ids=micro_batch.input_ids[None],
        position_ids=micro_batch.position_ids[None],
        use_cache=False,
        **keywords,
    )
    logits = output.logits[0]
    if not keeps_logits:
        logits = logits[micro_batch.predictor_positions]
    return token_logprobs(logits, micro_batch.target_ids, temperature)


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the (unwrapped) model can be asked for the logits of some positions only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return "logits_to_keep" in inspect.signature(base.forward).parameters
