"""One forward pass over a packed micro-batch, and the logprobs of its completion tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shoal.algorithm.logprobs import TokenLogprobs, token_logprobs
from shoal.algorithm.truncation import Truncation
from shoal.trainer.attention import boundaries
from shoal.trainer.logprob_head import HeadRequest, HeadSwitch, read_answer
from shoal.types import MicroBatch

# In units of the logits' standard deviation. What is masked contributes exact zeros, so the first bound is for kernels
# that are not deterministic; the second allows for bfloat16 and another order of summation.
_NO_INFLUENCE = 1e-3
_SAME_COMPUTATION = 0.1


def packed_logprobs(
    model: nn.Module,
    micro_batch: MicroBatch,
    *,
    temperature: float,
    keeps_logits: bool,
    truncation: Truncation | None = None,
    head: HeadSwitch | None = None,
    takes_boundaries: bool = False,
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
        truncation: What the engine cuts off before it samples.
        head: To have the model's LM head answer without logits; None for the logits.
        takes_boundaries: Whether its attention can be told where sequences begin, see `attention.takes_boundaries`.
    """
    keywords: dict[str, Any] = {"logits_to_keep": micro_batch.predictor_positions} if keeps_logits else {}
    if takes_boundaries:
        keywords |= boundaries(micro_batch.position_ids)
    if head is None:
        logits = _call(model, micro_batch, keywords)
        if not keeps_logits:
            logits = logits[micro_batch.predictor_positions]
        return token_logprobs(logits, micro_batch.target_ids, temperature, truncation=truncation)
    request = HeadRequest(
        target_ids=micro_batch.target_ids,
        positions=None if keeps_logits else micro_batch.predictor_positions,
        temperature=temperature,
        truncation=truncation,
    )
    with head.asking(request):
        return read_answer(_call(model, micro_batch, keywords), head.form)


def _call(model: nn.Module, micro_batch: MicroBatch, keywords: Mapping[str, Any]) -> torch.Tensor:
    """Call the model and return its logits: `[N, V]`, or `[T, V]` if it cannot keep some."""
    output = model(
        input_ids=micro_batch.input_ids[None],
        position_ids=micro_batch.position_ids[None],
        use_cache=False,
        **keywords,
    )
    logits: torch.Tensor = output.logits[0]
    return logits


@torch.no_grad()
def packs_exactly(model: nn.Module, *, wrapped: nn.Module | None = None, device: torch.device | None = None) -> bool:
    """Whether the (unwrapped) model keeps packed sequences apart.

    Found out by trying: models with recurrent states, with positions of their own, or with attention that transformers
    does not mask may let a sequence see the one before it, silently. The second of two packed sequences must not change
    with the first, and must be what it is alone.

    Args:
        model: A causal language model, unwrapped.
        wrapped: What to call in its place; a sharded model is called by all ranks together.
        device: Where inputs go; that of the parameters by default.
    """
    call = model if wrapped is None else wrapped
    device = device or next(model.parameters()).device
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    first, other, second = (
        (torch.arange(length, device=device) * step + step) % vocabulary
        for length, step in ((5, 7919), (5, 104729), (7, 15485863))
    )

    def logits_of_second(before: list[torch.Tensor]) -> torch.Tensor:
        positions = [torch.arange(len(ids), device=device) for ids in (*before, second)]
        output = call(
            input_ids=torch.cat([*before, second])[None], position_ids=torch.cat(positions)[None], use_cache=False
        )
        found: torch.Tensor = output.logits[0, -len(second) :].float()
        return found

    was_training = call.training
    call.eval()
    try:
        packed, changed, alone = logits_of_second([first]), logits_of_second([other]), logits_of_second([])
    finally:
        call.train(was_training)
    scale = alone.std()
    leaks = (packed - changed).abs().max() > _NO_INFLUENCE * scale
    differs = (packed - alone).abs().mean() > _SAME_COMPUTATION * scale
    return not (leaks or differs)


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the (unwrapped) model can be asked for the logits of some positions only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return "logits_to_keep" in inspect.signature(base.forward).parameters
