"""QLoRA: weights in 4 or 8 bits are sent as numbers, under the names of the checkpoint that was quantised."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, MixtralConfig

from shoal.errors import ConfigError
from shoal.weights.sources import make_source

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (pip install 'shoal[qlora]')",
)

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
EIGHT = {"load_in_8bit": True}
QUERY = "model.layers.0.self_attn.q_proj"


def sent(model: Any) -> dict[str, torch.Tensor]:
    source = make_source(model)
    values = {name: value.clone() for name, value in source.tensors()}
    assert [(meta.name, meta.num_elements) for meta in source.metadata()] == [(n, v.numel()) for n, v in values.items()]
    return values


def original(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


def quantised(folder: Path, bits: dict[str, Any], config: Any = None) -> Any:
    original(config or LlamaConfig(**SIZES)).save_pretrained(folder)
    settings = BitsAndBytesConfig(**bits)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16)


def with_lora(model: Any, **settings: Any) -> Any:
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_()
    return model


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), MixtralConfig(**SIZES, num_local_experts=2)], ids=type)
@pytest.mark.parametrize(("bits", "error"), [(FOUR, 0.15), (EIGHT, 0.01)], ids=["4", "8"])
def test_the_weights_are_the_originals_but_for_what_quantisation_lost(
    config: Any, bits: dict[str, Any], error: float, tmp_path: Path
) -> None:
    before, after = sent(original(config)), sent(quantised(tmp_path, bits, config))
    assert set(before) == set(after)
    for name, value in after.items():
        assert value.dtype == before[name].dtype and value.shape == before[name].shape
        assert (value - before[name]).abs().max() <= error * before[name].abs().max(), name
    assert not torch.equal(after[f"{QUERY}.weight"], before[f"{QUERY}.weight"])  # it was quantised


@pytest.mark.parametrize("bits", [FOUR, EIGHT], ids=["4", "8"])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_adapters_are_merged_into_the_dequantised_weight_which_stays_quantised(
    bits: dict[str, Any], variant: dict[str, Any], tmp_path: Path
) -> None:
    base = quantised(tmp_path, bits)
    plain = sent(base)
    packed = {name: value.detach().clone() for name, value in base.named_parameters()}
    model = with_lora(base, **variant)
    merged = sent(model)
    layer = model.get_submodule(f"base_model.model.{QUERY}")
    weight = plain[f"{QUERY}.weight"].view(64, 64).float()
    expected = weight + layer.get_delta_weight("default")
    if "use_dora" in variant:
        magnitude = layer.lora_magnitude_vector["default"].weight
        expected = expected * (magnitude / expected.norm(dim=1)).view(-1, 1)
    close = {"rtol": 2**-7, "atol": 1e-3}
    torch.testing.assert_close(merged[f"{QUERY}.weight"].view(64, 64).float(), expected.detach(), **close)
    assert (expected - weight).abs().max() > 0.1
    assert [name for name in plain if not torch.equal(plain[name], merged[name])] == [f"{QUERY}.weight"]
    for name, value in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(value, packed[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize(("bits", "error"), [(FOUR, 2**-7), (EIGHT, 0)], ids=["4", "8"])
def test_a_forward_pass_that_repacks_the_weights_changes_what_is_sent_by_no_more_than_it_rounds(
    bits: dict[str, Any], error: float, tmp_path: Path
) -> None:
    model = quantised(tmp_path, bits).eval()
    before = sent(model)
    with torch.no_grad():
        model(torch.arange(4).view(1, -1))
    for _ in range(2):
        for name, value in sent(model).items():
            torch.testing.assert_close(value, before[name], rtol=error, atol=0)


def test_a_divided_quantised_weight_is_refused_instead_of_sent_as_packed_bytes(tmp_path: Path) -> None:
    """FSDP2 can train it, if it is stored in the type of the other weights."""
    model = quantised(tmp_path, FOUR | {"bnb_4bit_quant_storage": torch.bfloat16})
    assert f"{QUERY}.weight" in sent(model)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ConfigError, match=r"q_proj.weight is 4-bit and sharded.*Train with DDP, ZeRO-1 or ZeRO-2"):
            sent(model)
    finally:
        dist.destroy_process_group()
