"""The trainer's weights as a checkpoint has them: plain, and with LoRA merged beside the base weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from shoal.errors import ConfigError
from shoal.testing import tiny_model
from shoal.weights.source import LoraMergedSource, ModuleSource, make_source

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def untied(**overrides: Any) -> Any:
    return tiny_model(tie_word_embeddings=False, **overrides)


def with_lora(model: Any, *, seed: int = 0, **settings: Any) -> Any:
    """Add an adapter that does something: PEFT starts B at zero."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | settings
    peft_model = get_peft_model(model, LoraConfig(**settings))
    randomise_adapter(peft_model, seed)
    return peft_model


@torch.no_grad()
def randomise_adapter(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))


def sent(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in make_source(model).tensors()}


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def test_a_plain_model_sends_its_parameters_as_they_lie() -> None:
    model = tiny_model()
    source = make_source(model)
    assert isinstance(source, ModuleSource)
    for name, value in source.tensors():
        assert value.data_ptr() == model.get_parameter(name).data_ptr()
        assert not value.requires_grad
    assert_same(sent(model), parameters(model))


def test_tied_parameters_are_sent_once_and_untied_ones_twice() -> None:
    tied, free = [name for name, _ in make_source(tiny_model()).tensors()], list(sent(untied()))
    assert "model.embed_tokens.weight" in tied and "lm_head.weight" not in tied
    assert set(free) - set(tied) == {"lm_head.weight"}


@pytest.mark.parametrize("adapted", [False, True])
def test_the_metadata_describes_what_is_sent_in_its_order(adapted: bool) -> None:
    model = untied(dtype=torch.bfloat16)
    source = make_source(with_lora(model) if adapted else model)
    described = [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
    assert described == [(n, str(v.dtype).removeprefix("torch."), tuple(v.shape)) for n, v in source.tensors()]


def test_a_change_of_the_model_is_seen_by_the_source() -> None:
    model = tiny_model()
    source = make_source(model)
    before = {name: value.clone() for name, value in source.tensors()}
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    after = dict(source.tensors())
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["model.norm.weight"]


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_merged_lora_equals_pefts_own_merge_bit_for_bit_in_float32(bias: str) -> None:
    model = with_lora(untied(attention_bias=True), bias=bias)
    source = make_source(model)
    assert isinstance(source, LoraMergedSource)
    actual = sent(model)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_same(actual, parameters(merged))


def test_the_base_weights_alone_are_not_what_is_sent() -> None:
    base = untied()
    expected = parameters(copy.deepcopy(base))
    actual = sent(with_lora(base))
    differ = {name.split(".")[-2] for name in actual if not torch.equal(actual[name], expected[name])}
    assert differ == set(ATTENTION)  # the control of the test above


def test_in_bfloat16_base_and_delta_are_added_in_float32_and_rounded_once() -> None:
    model = with_lora(untied(dtype=torch.bfloat16))
    base = {name: value.clone() for name, value in parameters(model).items()}
    rounded_twice = 0
    for name, value in sent(model).items():
        layer_name = name.removesuffix(".weight")
        if layer_name.split(".")[-1] not in ATTENTION:
            continue
        layer = model.get_submodule(f"base_model.model.{layer_name}")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.dtype == b.dtype == torch.float32
        delta = (b @ a) * 2.0  # lora_alpha / r
        weight = base[f"base_model.model.{layer_name}.base_layer.weight"]
        assert torch.equal(value, (weight.float() + delta).to(torch.bfloat16)), name
        rounded_twice += int((value != weight + delta.to(torch.bfloat16)).sum())
    assert rounded_twice > 0  # the control: rounding the delta first gives other weights


def test_the_base_weights_do_not_change_by_a_bit_over_many_publishes() -> None:
    model = with_lora(untied(dtype=torch.bfloat16))
    before = {name: value.clone() for name, value in parameters(model).items() if "lora_" not in name}
    first = sent(model)
    for seed in range(20):
        randomise_adapter(model, seed)
        for _ in make_source(model).tensors():
            pass
    randomise_adapter(model, 0)
    assert_same({name: value for name, value in parameters(model).items() if "lora_" not in name}, before)
    assert_same(sent(model), first)


def test_merging_and_unmerging_in_place_would_drift() -> None:
    model = with_lora(untied(dtype=torch.bfloat16))
    before = {name: value.clone() for name, value in parameters(model).items() if "lora_" not in name}
    for seed in range(20):
        randomise_adapter(model, seed)
        model.merge_adapter()
        model.unmerge_adapter()
    after = parameters(model)
    assert any(not torch.equal(after[name], before[name]) for name in before)  # the control of the test above


def test_an_iteration_that_is_left_half_way_leaves_the_model_as_it_was() -> None:
    model = with_lora(untied())
    before = {name: value.clone() for name, value in parameters(model).items()}
    iterator = make_source(model).tensors()
    for _ in range(4):
        next(iterator)
    del iterator
    assert_same(parameters(model), before)


def test_a_model_that_is_merged_already_is_sent_as_it_is() -> None:
    model = with_lora(untied())
    expected = sent(model)
    model.merge_adapter()
    assert_same(sent(model), expected)


def test_modules_to_save_are_sent_in_the_place_of_the_originals() -> None:
    model = with_lora(untied(), modules_to_save=["norm", "lm_head"])
    actual = sent(model)
    merged = parameters(copy.deepcopy(model).merge_and_unload())
    assert_same(actual, merged)
    original = parameters(untied())
    assert not torch.equal(actual["lm_head.weight"], original["lm_head.weight"])
    assert not torch.equal(actual["model.norm.weight"], original["model.norm.weight"])


def test_modules_saved_by_an_adapter_that_is_not_active_are_not_sent() -> None:
    model = with_lora(untied(), modules_to_save=["lm_head"])
    expected = sent(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert_same(sent(model), expected)


def test_the_active_adapter_of_two_is_the_one_that_is_merged() -> None:
    model = with_lora(untied())
    first = sent(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    randomise_adapter(model, 5)
    model.set_adapter("other")
    second = sent(model)
    assert_same(second, parameters(copy.deepcopy(model).merge_and_unload(adapter_names=["other"])))
    assert not torch.equal(
        first["model.layers.0.self_attn.v_proj.weight"], second["model.layers.0.self_attn.v_proj.weight"]
    )


def test_an_adapter_on_an_untied_embedding_is_merged() -> None:
    model = with_lora(untied(), target_modules=["q_proj", "embed_tokens"])
    actual = sent(model)
    assert_same(actual, parameters(copy.deepcopy(model).merge_and_unload()))
    assert not torch.equal(actual["model.embed_tokens.weight"], parameters(untied())["model.embed_tokens.weight"])


def test_the_merged_weights_compute_what_the_adapted_model_computes() -> None:
    model = with_lora(untied())
    plain = untied(seed=7)
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        wanted = model(ids).logits
        assert (plain(ids).logits - wanted).abs().max() > 0.1
        plain.load_state_dict(sent(model))
        assert (plain(ids).logits - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "use_dora=False"),
        ({"lora_bias": True}, "lora_bias=False"),
        ({"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}, "ALora"),
        ({"trainable_token_indices": [3]}, "TrainableTokensLayer"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_naming_the_layer(settings: dict[str, Any], says: str) -> None:
    model = with_lora(untied(attention_bias=True), **settings)
    with pytest.raises(ConfigError, match=says) as refusal:
        make_source(model)
    assert "q_proj" in str(refusal.value) or "embed_tokens" in str(refusal.value)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT sees it coming too
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
)
def test_an_adapter_on_one_of_two_tied_parameters_is_refused_since_engines_keep_them_tied(
    settings: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError, match=r"embed_tokens.*lm_head.*tied"):
        make_source(with_lora(tiny_model(), **settings))
    assert sent(with_lora(untied(), **settings))  # the control: without the tie each of them can be sent
