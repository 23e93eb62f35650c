"""What the tests on GPUs share: a model small enough to start at once and large enough for vLLM's kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small model on the first GPU, and the folder that an engine reads."""
    model = tiny_model(
        dtype=torch.bfloat16,
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        initializer_range=0.05,
    ).to("cuda:0")
    folder = tmp_path_factory.mktemp("model")
    model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.eval(), folder
