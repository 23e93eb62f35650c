"""The sampling parameters of vLLM's second runner reach the GPU when a request comes, and are not copied otherwise."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import shoal.vllm_plugin.worker  # noqa: F401 - what vLLM imports in its workers
from shoal import vllm_compat

NUM_REQUESTS, VOCABULARY = 4, 10


class HostBuffer:
    """Stands for memory that the GPU reads where the host writes it (0.26)."""

    def __init__(self, size: Any, dtype: torch.dtype) -> None:
        self.cpu = self.uva = torch.zeros(size, dtype=dtype)
        self.np = self.cpu.numpy()


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own, on the CPU."""
    buffers = importlib.import_module("vllm.v1.worker.gpu.buffer_utils")
    if hasattr(buffers, "NonUvaBuffer"):
        monkeypatch.setattr(buffers, "is_uva_available", lambda: False)
    else:
        monkeypatch.setattr(buffers, "UvaBuffer", HostBuffer)
    sizes = {"max_num_reqs": NUM_REQUESTS, "vocab_size": VOCABULARY, "device": torch.device("cpu")}
    states = importlib.import_module("vllm.v1.worker.gpu.states").RequestState(
        max_model_len=16, max_num_batched_tokens=16, num_speculative_steps=0, **sizes
    )
    kind = importlib.import_module("vllm.v1.worker.gpu.sample.sampler").Sampler
    given = sizes | {"req_states": states, "vllm_config": SimpleNamespace(reasoning_config=None)}
    return kind(**{name: value for name, value in given.items() if name in inspect.signature(kind).parameters})


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is copied."""
    found: list[Any] = []
    pool = importlib.import_module("vllm.v1.worker.gpu.buffer_utils").UvaBufferPool
    copy = pool.copy_to_uva
    monkeypatch.setattr(pool, "copy_to_uva", lambda self, values: found.append(values) or copy(self, values))
    return found


def come(sampler: Any, row: int, seed: int) -> None:
    params = vllm_compat.sampling_params({"temperature": (1 + row) / 4, "max_tokens": 3}, seed=seed, flush_tokens=1)
    # 0.26 is told how long the prompt is.
    sampler.add_request(
        *[row, 1, params] if "prompt_len" in inspect.signature(sampler.add_request).parameters else [row, params]
    )


def test_parameters_are_there_after_a_request_has_come_and_nothing_is_copied_otherwise(
    sampler: Any, copies: list[Any]
) -> None:
    sampler.apply_staged_writes()
    for row, seed in ((2, 11), (0, 12)):
        come(sampler, row, seed)
        copies.clear()
        sampler.apply_staged_writes()
        assert len(copies) > 10
        copies.clear()
        for _ in range(3):
            sampler.apply_staged_writes()
            assert sampler.sampling_states.seeds.gpu[row] == seed
            assert sampler.sampling_states.temperature.gpu[row] == (1 + row) / 4
        assert not copies


def test_logits_processors_of_others_are_told_of_every_step(sampler: Any) -> None:
    if not hasattr(sampler, "logits_processors"):
        pytest.skip("this vLLM's second runner has none")
    told: list[int] = []
    sampler.logits_processors.append(SimpleNamespace(apply_staged_writes=lambda: told.append(1)))
    for _ in range(3):
        sampler.apply_staged_writes()
    assert len(told) == 3
