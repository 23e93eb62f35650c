"""A model's weights are what `save_pretrained` writes: the same names, shapes and bits, without a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.core_model_loading import Concatenate, Transpose, WeightConverter

from shoal.errors import ConfigError
from shoal.testing import tiny_model
from shoal.types import Interval
from shoal.weights.sources import make_source

DENSE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = DENSE | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": DENSE,
    "Qwen2": DENSE,
    "Qwen3": DENSE,
    "Gemma3Text": DENSE,
    "Mixtral": EXPERTS,
    "Qwen3Moe": EXPERTS,
    "GptOss": EXPERTS,
    # Has a persistent buffer, which vLLM loads.
    "Glm4Moe": EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1},
}


def tiny(kind: str, *, tied: bool = False) -> Any:
    config = getattr(transformers, f"{kind}Config")(**MODELS[kind], tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for value in [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]:
            value.normal_()  # norms and biases that all start equal would hide a mistake
    return model


def sent(model: nn.Module) -> dict[str, torch.Tensor]:
    source = make_source(model)
    shapes = {meta.name: meta.shape for meta in source.metadata()}
    return {name: value.clone().view(shapes[name]) for name, value in source.tensors()}


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype and value.shape == expected[name].shape, name
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_sent_is_what_save_pretrained_writes(kind: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(kind, tied=tied)
    assert_same(sent(model), saved(model, tmp_path))


def test_a_loaded_model_sends_what_was_loaded_and_not_the_names_in_memory(tmp_path: Path) -> None:
    expected = saved(tiny("Mixtral"), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(sent(model), expected)
    assert set(expected) != set(dict(model.named_parameters()))  # the control: they do differ


def test_nothing_is_copied_not_even_an_expert() -> None:
    for model in (tiny_model(), tiny("Mixtral")):
        storages = {value.untyped_storage().data_ptr() for value in model.parameters()}
        source = make_source(model)
        assert {meta.name: Interval(0, meta.num_elements) for meta in source.metadata()} == source.held()
        for _, value in source.tensors():
            assert value.untyped_storage().data_ptr() in storages
            assert value.dim() == 1 and value.is_contiguous() and not value.requires_grad


def test_the_metadata_describes_what_is_sent_in_its_order() -> None:
    source = make_source(tiny("Qwen3Moe").to(torch.bfloat16))
    assert [(m.name, m.dtype, m.num_elements) for m in source.metadata()] == [
        (name, str(value.dtype).removeprefix("torch."), value.numel()) for name, value in source.tensors()
    ]


def test_a_change_of_the_model_is_seen_by_the_source() -> None:
    model = tiny_model()
    source = make_source(model)
    before = {name: value.clone() for name, value in source.tensors()}
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    assert [name for name, value in source.tensors() if not torch.equal(value, before[name])] == ["model.norm.weight"]


@pytest.mark.parametrize("change", ["data", "parameter", "storage"])
def test_what_lies_still_is_the_same_tensor_and_what_moved_is_found_where_it_is_now(change: str) -> None:
    model = tiny_model()
    source = make_source(model)
    first = dict(source.tensors())
    assert all(value is first[name] for name, value in source.tensors())
    norm = model.model.norm
    moved = torch.full_like(norm.weight.data, 3.0)
    if change == "data":
        norm.weight.data = moved
    elif change == "parameter":
        norm.weight = nn.Parameter(moved)
    else:
        storage = norm.weight.untyped_storage()
        storage.resize_(0)
        storage.resize_(1 << 20)  # elsewhere, as it was larger than what was there
        norm.weight.data.copy_(moved)
    second = dict(source.tensors())
    assert [name for name, value in second.items() if value is not first[name]] in (["model.norm.weight"], list(first))
    assert torch.equal(second["model.norm.weight"], moved)
    assert second["model.norm.weight"].data_ptr() == norm.weight.data_ptr()


def test_wrappers_do_not_show_in_the_names(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = tiny("Mixtral")
    expected = saved(model, tmp_path)
    model.model.layers[0] = torch.compile(checkpoint_wrapper(model.model.layers[0]))
    model.model.layers[1].mlp = checkpoint_wrapper(model.model.layers[1].mlp)
    assert_same(sent(nn.DataParallel(torch.compile(model))), expected)


def test_a_parameter_that_the_checkpoint_has_transposed_is_copied_in_its_order(tmp_path: Path) -> None:
    model = tiny("Llama")
    expected = saved(model, tmp_path)
    model._weight_conversions = [WeightConverter("up_proj.weight", "up_proj.weight", [Transpose(0, 1)])]
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(sent(model)[name], expected[name].t())
    assert not torch.equal(sent(model)[name].reshape(-1), expected[name].reshape(-1))


def test_a_parameter_that_is_computed_while_saving_is_refused() -> None:
    model = tiny("Llama")
    names = ["q_proj.weight", "k_proj.weight"]
    from transformers.core_model_loading import Chunk

    model._weight_conversions = [WeightConverter("qk_proj.weight", names, [Chunk(0)])]
    with pytest.raises(ConfigError, match=r"qk_proj.*LlamaForCausalLM.*computed"):
        make_source(model)
    assert Chunk(0).reverse_op.__class__ is Concatenate


def test_a_tied_model_whose_weights_were_untied_is_refused() -> None:
    model = tiny("Llama", tied=True)
    assert "lm_head.weight" not in sent(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ConfigError, match="tied"):
        make_source(model)
