"""Parameters counted from a configuration are those of the model that transformers makes from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from shoal.bench.shapes import SHAPES, qwen3_config
from shoal.errors import PlacementError
from shoal.placement.architecture import FAMILIES, architecture_from_config

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    *((family, {"tie_word_embeddings": True}) for family in ("llama", "qwen2", "qwen3", "mixtral")),
    ("gemma2", {"tie_word_embeddings": False}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    ("qwen3", {"attention_bias": True, "head_dim": 32}),
    ("gemma3_text", {"head_dim": 32}),
    ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    ("qwen3_moe", {"num_experts": 6, "moe_intermediate_size": 40, "decoder_sparse_step": 2, "head_dim": 32}),
    ("qwen3_moe", {"num_experts": 6, "moe_intermediate_size": 40, "mlp_only_layers": [1]}),
]


def _count(config: Any) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=lambda value: str(value))
def test_every_parameter_is_counted(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = CONFIG_MAPPING[family](**SMALL | changes)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert architecture_from_config(written).num_parameters == _count(config)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    heads=st.sampled_from([2, 4, 6]),
    width=st.sampled_from([8, 16]),
    layers=st.integers(1, 4),
    vocabulary=st.integers(10, 200),
)
def test_any_shape_is_counted(family: str, heads: int, width: int, layers: int, vocabulary: int) -> None:
    changes = {
        "hidden_size": heads * width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }
    config = CONFIG_MAPPING[family](**SMALL | changes)
    assert architecture_from_config(config.to_dict()).num_parameters == _count(config)


def test_published_sizes_come_out() -> None:
    # Qwen3-8B: 8,190,735,360 parameters (its model card says 8.2B); 36 layers x 8 heads x 128 x 2 x 2 bytes of KV.
    found = architecture_from_config(qwen3_config(SHAPES["qwen3-8b"]).to_dict())
    assert found.num_parameters == 8_190_735_360
    assert found.kv_bytes_per_token() == 147_456


def test_a_token_passes_its_own_experts_only() -> None:
    config = CONFIG_MAPPING["mixtral"](**SMALL, num_local_experts=8, num_experts_per_tok=2).to_dict()
    sparse = architecture_from_config(config)
    dense = architecture_from_config(config | {"num_experts_per_tok": 8})
    difference = 3 * 6 * 3 * 64 * 96  # 3 blocks, 6 experts more, 3 matrices
    assert dense.matmul_parameters - sparse.matmul_parameters == difference
    assert dense.num_parameters == sparse.num_parameters


def test_an_adapter_has_as_many_parameters_as_peft_makes() -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj"]
    config = CONFIG_MAPPING["qwen3"](**SMALL)
    with torch.device("meta"):
        model = get_peft_model(
            AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        )
    trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
    found = architecture_from_config(config.to_dict())
    assert found.lora_parameters(4, frozenset(targets)) == trainable
    assert found.lora_parameters(4) > trainable


def test_operations_are_six_for_each_weight_and_token_and_grow_with_the_length() -> None:
    found = architecture_from_config(CONFIG_MAPPING["llama"](**SMALL).to_dict())
    assert found.training_flops(10, 0) == 60 * (3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96) + 131 * 64)
    # Scores and mixing of values, forward and twice backward: 3 x 2 x 2 x 64 x (length / 2) x 3 blocks.
    assert found.training_flops(1, 100) - found.training_flops(1, 0) == 6 * 64 * 100 * 3


def test_an_unknown_family_and_a_config_without_sizes_are_refused() -> None:
    with pytest.raises(PlacementError, match=r"model_type='mamba'.*gemma2"):
        architecture_from_config({"model_type": "mamba"})
    with pytest.raises(PlacementError, match="no hidden_size"):
        architecture_from_config({"model_type": "llama"})
