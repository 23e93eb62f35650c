"""What takes the place of vLLM's bookkeeping where workers hold plain modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from shoal import vllm_compat


@contextmanager
def _empty_parameters(model: nn.Module) -> Iterator[None]:
    kept = [(layer, dict(layer._parameters)) for layer in model.modules()]
    for layer, parameters in kept:
        for name, value in parameters.items():
            layer._parameters[name] = nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
    try:
        yield
    finally:
        for layer, parameters in kept:
            layer._parameters.update(parameters)


@pytest.fixture
def plain_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers take plain modules for vLLM's: each keeps its layout, and none is wrapped."""

    def nothing(*_: Any) -> Any:
        return nullcontext()

    monkeypatch.setattr(vllm_compat, "worker_context", nothing)
    monkeypatch.setattr(vllm_compat, "without_adapters", nothing)
    monkeypatch.setattr(vllm_compat, "keeps_layout", lambda layer: True)
    monkeypatch.setattr(vllm_compat, "loading_layout", _empty_parameters)
