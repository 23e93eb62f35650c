"""The slow, exact reference that other engines are tested against: completions by transformers, one at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from shoal.algorithm.truncation import Truncation, find_support
from shoal.types import EngineReport, FinishReason, Rollout, RolloutRequest, SamplingSettings


class ReferenceEngine:
    """A `RolloutEngine` that runs a transformers model in this process, without a cache of keys and values.

    Args:
        model: A causal language model, in evaluation mode.
        name: For metrics.
    """

    def __init__(self, model: Any, *, name: str = "reference") -> None:
        self._model = model
        self._name = name
        self.weight_version = 0

    @property
    def name(self) -> str:
        """Short name."""
        return self._name

    async def generate(self, request: RolloutRequest) -> Rollout:
        """Write one completion: greedy at temperature 0, else by inverse transform of this sample's own stream."""
        return self.complete(request)

    def written(self, name: str) -> None:
        """Nothing: it answers when it has ended."""

    async def cut(self, name: str) -> None:
        """Go on: it writes one completion at a time, and nothing else meanwhile."""

    async def report(self) -> EngineReport:
        """Say that it is idle: it does nothing else while it writes."""
        return EngineReport(running=0, waiting=0)

    @torch.no_grad()
    def complete(self, request: RolloutRequest) -> Rollout:
        """Write one completion."""
        device = next(self._model.parameters()).device
        random = np.random.default_rng(request.seed)
        ids = list(request.prompt_token_ids)
        tokens: list[int] = []
        logprobs: list[float] = []
        finish_reason: FinishReason = "length"
        while len(tokens) < request.sampling.max_tokens:
            logits = self._model(torch.tensor([ids], device=device), use_cache=False).logits[0, -1].double()
            token, logprob = _sample(logits.cpu(), request.sampling, random)
            ids.append(token)
            tokens.append(token)
            logprobs.append(logprob)
            if token in request.sampling.stop_token_ids:
                finish_reason = "stop"
                break
        return Rollout(
            token_ids=np.array(tokens, dtype=np.int32),
            rollout_logprobs=np.array(logprobs, dtype=np.float32),
            finish_reason=finish_reason,
            weight_version=self.weight_version,
            engine=self._name,
        )


def _sample(logits: torch.Tensor, sampling: SamplingSettings, random: np.random.Generator) -> tuple[int, float]:
    if sampling.temperature == 0:
        logprobs = torch.log_softmax(logits, dim=-1)
        token = int(logprobs.argmax())
        return token, float(logprobs[token])
    logits = logits / sampling.temperature
    truncation = Truncation(top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    if not truncation.is_off:
        low = find_support(logits[None], logits.argmax()[None], truncation).low
        logits = logits.masked_fill(logits <= low, -torch.inf)
    logprobs = torch.log_softmax(logits, dim=-1)
    cumulative = logprobs.exp().cumsum(0)
    token = int(torch.searchsorted(cumulative, random.random() * float(cumulative[-1]), right=True))
    token = min(token, len(logprobs) - 1)
    return token, float(logprobs[token])
