"""What the tests with real vLLM engines share: a model small enough to serve on a CPU, and how to start it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from shoal.engines.command import EngineSpec
from shoal.testing import tiny_model, tiny_tokenizer

SpecMaker: TypeAlias = Callable[..., EngineSpec]


@pytest.fixture(scope="session")
def make_served_model() -> Callable[..., Any]:
    """Return a maker of models that vLLM's CPU attention can serve (its heads must be 32 wide at least).

    Biases, a vocabulary that vLLM pads and tied embeddings are there because each goes its own way into an engine.
    """

    def make(**overrides: Any) -> Any:
        settings = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 300, "attention_bias": True}
        return tiny_model(**(settings | overrides)).eval()

    return make


@pytest.fixture(scope="session")
def served_model_dir(tmp_path_factory: pytest.TempPathFactory, make_served_model: Callable[..., Any]) -> Path:
    """Return a folder with the config and the tokenizer of such a model, and no weights."""
    folder = tmp_path_factory.mktemp("served_model")
    make_served_model().config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_spec(served_model_dir: Path) -> SpecMaker:
    """Return a maker of specs of CPU engines that serve it."""

    def make(name: str, port: int, **changes: Any) -> EngineSpec:
        settings: dict[str, Any] = {
            "model_dir": served_model_dir,
            "cuda_devices": (),
            "cpu_cores": (),
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "dtype": "float32",
            "max_model_len": 256,
            "gpu_memory_utilization": 0.9,
            "cpu_kv_cache_gib": 1,
            "seed": 0,
            "extra_arguments": {},
        }
        return EngineSpec(name=name, port=port, **(settings | changes))

    return make
