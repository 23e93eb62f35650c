"""The adapter alone: named as PEFT saves it, and scaled so that engines serve it with scaling 1."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from shoal.errors import ConfigError
from shoal.testing import tiny_model
from shoal.types import Interval
from shoal.weights.sources import AdapterSource, make_source, write_adapter

IDS = torch.arange(3, 40).view(1, -1)


def with_lora(**settings: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | settings
    model = get_peft_model(tiny_model(), LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(0.1 * torch.randn(value.shape))
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_names_and_values_are_those_that_peft_saves_but_for_the_scaling(rslora: bool, tmp_path: Path) -> None:
    model = with_lora(use_rslora=rslora)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    source = AdapterSource(model)
    assert {meta.name: meta.shape for meta in source.metadata()} == {n: tuple(v.shape) for n, v in saved.items()}
    assert source.held() == {meta.name: Interval(0, meta.num_elements) for meta in source.metadata()}
    sent = dict(source.tensors())
    assert list(sent) == [meta.name for meta in source.metadata()]
    for name, value in saved.items():
        scaling = (6 / 2 if rslora else 6 / 4) if ".lora_B." in name else 1
        assert torch.equal(sent[name], (value * scaling).reshape(-1)), name


def test_the_copy_that_is_sent_stays_where_it_is_and_follows_the_adapter() -> None:
    model = with_lora()
    source = AdapterSource(model, wire_dtype=torch.bfloat16)
    assert source.in_place() == {meta.name for meta in source.metadata()}
    first = dict(source.tensors())
    before = {name: value.clone() for name, value in first.items()}
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(1)
    layer.lora_A["default"].weight.data = torch.full_like(layer.lora_A["default"].weight, 2.0)
    second = dict(source.tensors())
    assert all(second[name] is value for name, value in first.items())
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    changed = [f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"]
    assert [name for name, value in second.items() if not torch.equal(value, before[name])] == changed
    assert torch.equal(second[changed[1]], (layer.lora_B["default"].weight * 1.5).bfloat16().reshape(-1))
    layer.scaling["default"] = 1.0
    assert torch.equal(dict(source.tensors())[changed[1]], layer.lora_B["default"].weight.bfloat16().reshape(-1))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_the_written_folder_computes_what_the_model_computes_with_scaling_one(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model = with_lora(**settings)
    write_adapter(torch.compile(model), tmp_path)
    if "rank_pattern" in settings:
        # Engines take the ranks from the tensors; PEFT would want the pattern.
        ranks = {v.shape[0] for n, v in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in n}
        assert ranks == {2, 4}
        return
    served = PeftModel.from_pretrained(tiny_model(), tmp_path)
    layer = served.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer.scaling == {"default": 1.0}
    with torch.no_grad():
        torch.testing.assert_close(served(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
        assert (tiny_model()(IDS).logits - model(IDS).logits).abs().max() > 0.1


def test_the_base_and_the_adapter_make_the_merged_weight() -> None:
    model = with_lora(use_rslora=True)
    factors = dict(AdapterSource(model).whole_tensors())
    base = make_source(tiny_model())
    merged = {name: value.clone() for name, value in make_source(model).tensors()}
    name = "model.layers.1.mlp.down_proj"
    product = factors[f"base_model.model.{name}.lora_B.weight"] @ factors[f"base_model.model.{name}.lora_A.weight"]
    expected = dict(base.tensors())[f"{name}.weight"] + product.reshape(-1)
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)


def test_the_type_of_the_wire_is_that_of_the_tensors() -> None:
    source = AdapterSource(with_lora(), wire_dtype=torch.bfloat16)
    assert {meta.dtype for meta in source.metadata()} == {"bfloat16"}
    assert {value.dtype for _, value in source.tensors()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "Dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "embedding"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_engines_cannot_serve_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AdapterSource(with_lora(**settings))


def test_exactly_one_adapter_must_be_active() -> None:
    model = with_lora()
    assert AdapterSource(copy.deepcopy(model)).metadata()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    for refused in (model, tiny_model()):
        with pytest.raises(ConfigError, match="one adapter"):
            AdapterSource(refused)


def test_vllm_accepts_the_folder_and_serves_it_with_scaling_one(tmp_path: Path) -> None:
    peft_helper = pytest.importorskip("vllm.lora.peft_helper", reason="vLLM is not installed")
    from vllm.config.lora import LoRAConfig as EngineLoRAConfig

    write_adapter(with_lora(use_rslora=True), tmp_path)
    helper = peft_helper.PEFTHelper.from_local_dir(str(tmp_path), max_position_embeddings=None)
    helper.validate_legal(EngineLoRAConfig(max_lora_rank=8))
    assert helper.vllm_lora_scaling_factor == 1.0 and helper.r == 4
