"""Models come as users name them, prepared for training; the reference stays what the policy was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shoal import GRPOConfig
from shoal.errors import ConfigError
from shoal.testing import tiny_model, tiny_tokenizer
from shoal.trainer.model import (
    compute_dtype,
    context_length,
    is_sharded,
    load_policy,
    load_tokenizer,
    num_parameter_bytes,
    read_config,
    stop_token_ids,
)


def config(**settings: Any) -> GRPOConfig:
    return GRPOConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False} | settings)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A checkpoint in bfloat16, as most are."""
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_named_model_is_loaded_in_full_precision_unless_told_otherwise(folder: str) -> None:
    assert {value.dtype for value in load_policy(folder, config()).parameters()} == {torch.float32}
    told = config(model_init_kwargs={"dtype": "bfloat16"})
    assert {value.dtype for value in load_policy(folder, told).parameters()} == {torch.bfloat16}


def test_a_loaded_model_has_the_checkpoints_weights_and_no_cache(folder: str) -> None:
    policy = load_policy(folder, config())
    expected = tiny_model(dtype=torch.bfloat16).float().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in policy.state_dict().items())
    assert policy.config.use_cache is False
    assert read_config(folder, config()).hidden_size == 64


def test_a_tokenizer_is_found_by_the_models_name_or_by_where_it_came_from(folder: str) -> None:
    assert load_tokenizer(folder, config())("ab").input_ids == tiny_tokenizer()("ab").input_ids
    assert load_tokenizer(load_policy(folder, config()), config()).eos_token_id == 2
    with pytest.raises(ConfigError, match="Pass its tokenizer as processing_class"):
        load_tokenizer(tiny_model(), config())


@pytest.mark.parametrize("disabled", [True, False])
def test_dropout_is_turned_off_on_request_only(disabled: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3))
    prepared = load_policy(model, config(disable_dropout=disabled))
    assert prepared.get_submodule("1").p == (0.0 if disabled else 0.3)  # type: ignore[comparison-overlap]


def test_a_completion_ends_at_every_token_that_the_tokenizer_or_the_model_names() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert stop_token_ids(model, tokenizer) == (2,)
    model.generation_config.eos_token_id = [9, 2, 7]
    assert stop_token_ids(model, tokenizer) == (2, 7, 9)
    model.generation_config.eos_token_id = 5
    tokenizer.eos_token = None
    assert stop_token_ids(model, tokenizer) == (5,)
    assert stop_token_ids(nn.Linear(1, 1), tokenizer) == ()


def test_engines_compute_in_what_the_trainer_computes_in() -> None:
    assert compute_dtype(tiny_model(), config()) == "float32"
    assert compute_dtype(tiny_model(dtype=torch.bfloat16), config()) == "bfloat16"
    assert compute_dtype(tiny_model(), config(bf16=True)) == "bfloat16"


def test_what_is_read_off_a_model_is_what_it_has() -> None:
    model = tiny_model()
    assert context_length(model.config) == 256
    assert num_parameter_bytes(model) == 4 * sum(value.numel() for value in model.parameters())
    assert num_parameter_bytes(tiny_model(dtype=torch.bfloat16)) == num_parameter_bytes(model) // 2
    assert not is_sharded(model)
    model.model.norm.weight.ds_id = 0
    assert is_sharded(model)
