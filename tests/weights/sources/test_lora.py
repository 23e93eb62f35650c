"""LoRA merged beside the base weights, which stay as they are, bit for bit."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MixtralConfig

from shoal.errors import ConfigError
from shoal.testing import tiny_model
from shoal.weights.sources import lora, make_source

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def untied(**overrides: Any) -> Any:
    return tiny_model(tie_word_embeddings=False, **overrides)


def tiny_mixtral() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(
            MixtralConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=4,
                tie_word_embeddings=False,
            )
        )


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
    source = make_source(model)
    shapes = {meta.name: meta.shape for meta in source.metadata()}
    return {name: value.clone().view(shapes[name]) for name, value in source.tensors()}


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside that are still there; `peak` is the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            address = storage.data_ptr()
            if address not in before and address not in self._known:
                self._known.add(address)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._gone, address, storage.nbytes())
        return result

    def _gone(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self._now -= num_bytes


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_merged_lora_equals_pefts_own_merge_bit_for_bit_in_float32(bias: str) -> None:
    model = with_lora(untied(attention_bias=True), bias=bias)
    actual = sent(model)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_same(actual, parameters(merged))


@pytest.mark.parametrize("block", [1, 100, 1000])
def test_a_merge_by_blocks_of_rows_is_the_same_but_for_the_order_of_summation(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(untied())
    whole = sent(model)
    monkeypatch.setattr(lora, "_BLOCK_ELEMENTS", block)
    for name, value in sent(model).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-7)


def test_a_merge_takes_no_more_memory_than_the_merged_weight_and_three_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = with_lora(
        torch.nn.Sequential(torch.nn.Linear(256, 1024, bias=False, dtype=torch.bfloat16)), target_modules=["0"]
    )
    monkeypatch.setattr(lora, "_BLOCK_ELEMENTS", 1 << 13)
    source = make_source(layer, wire_dtype=torch.bfloat16)
    merged, block, factors = 1024 * 256 * 2, 4 << 13, 4 * 4 * (1024 + 256)
    with torch.no_grad(), LiveBytes() as live:
        for _ in source.tensors():
            pass
    assert merged < live.peak <= merged + 3 * block + factors
    # The control: the whole product in float32 alone would be more.
    assert live.peak < 4 * 1024 * 256


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"use_dora": True, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"lora_bias": True},
        {"lora_bias": True, "use_rslora": True, "bias": "all"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_kind_of_lora_is_merged_as_peft_merges_it(settings: dict[str, Any]) -> None:
    model = with_lora(untied(attention_bias=True), **settings)
    actual = sent(model)
    assert_same(actual, parameters(copy.deepcopy(model).merge_and_unload()))
    plain = parameters(untied(attention_bias=True))
    assert any(not torch.equal(actual[name], plain[name]) for name in actual)


def test_several_active_adapters_are_merged_one_after_the_other() -> None:
    for dora in (False, True):
        model = with_lora(untied(), use_dora=dora)
        one = sent(model)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], use_dora=dora))
        randomise_adapter(model, 5)
        model.base_model.set_adapter(["default", "other"])
        actual = sent(model)
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"])
        for name, value in parameters(merged).items():
            # PEFT takes the first adapter out again for DoRA's norm, which rounds.
            torch.testing.assert_close(actual[name], value, rtol=1e-5 if dora else 0, atol=1e-6 if dora else 0)
        name = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(actual[name], one[name])


def test_an_adapter_on_a_convolution_is_merged() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 6, 3)

    torch.manual_seed(0)
    model = with_lora(Net(), target_modules=["conv"])
    assert_same(sent(model), parameters(copy.deepcopy(model).merge_and_unload()))


def test_adapted_experts_are_merged_and_sent_one_by_one() -> None:
    torch.manual_seed(0)
    model = with_lora(
        tiny_mixtral(),
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    actual = sent(model)
    merged = sent(copy.deepcopy(model).merge_and_unload())
    assert_same(actual, merged)
    base = sent(tiny_mixtral())
    for expert in ("w1", "w2", "w3"):
        name = f"model.layers.0.block_sparse_moe.experts.1.{expert}.weight"
        assert not torch.equal(actual[name], base[name])


def test_the_order_stays_when_peft_reorders_the_parameters_of_a_layer() -> None:
    model = with_lora(tiny_mixtral(), target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    source = make_source(model)
    before = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        model(torch.arange(4).view(1, -1))
    assert [name for name, _ in model.named_parameters()] != before  # the control
    assert [name for name, _ in source.tensors()] == [meta.name for meta in source.metadata()]


def test_a_compiled_and_wrapped_model_sends_the_same() -> None:
    model = with_lora(untied())
    expected = sent(model)
    model.base_model.model.model.layers[0] = torch.compile(model.base_model.model.model.layers[0])
    assert_same(sent(torch.compile(model)), expected)


def test_computed_values_come_in_the_type_of_the_wire_and_the_rest_as_it_lies() -> None:
    model = with_lora(untied())
    full = sent(model)
    values = dict(make_source(model, wire_dtype=torch.bfloat16).tensors())
    for name, value in values.items():
        merged = name.split(".")[-2] in ATTENTION
        assert value.dtype == (torch.bfloat16 if merged else torch.float32), name
        assert torch.equal(value, full[name].view(-1).to(value.dtype))


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
    source = make_source(model)
    for seed in range(100):  # merging and unmerging in place has drifted after 20
        randomise_adapter(model, seed)
        for _ in source.tensors():
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
        ({"lora_bias": True, "target_modules": ["q_proj", "down_proj"]}, "lora_bias=False"),
        ({"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}, "ALora"),
        ({"trainable_token_indices": [3]}, "TrainableTokensLayer"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_naming_the_layer(settings: dict[str, Any], says: str) -> None:
    model = with_lora(untied(attention_bias=True), **settings)
    with pytest.raises(ConfigError, match=says) as refusal:
        make_source(model)
    assert any(layer in str(refusal.value) for layer in ("q_proj", "down_proj", "embed_tokens"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT sees it coming too
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
)
def test_an_adapter_on_one_of_two_tied_parameters_is_refused_since_engines_keep_them_tied(
    settings: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError, match=r"embed_tokens.*lm_head.*tied"):
        make_source(with_lora(tiny_model(), **settings))
    assert sent(with_lora(untied(), **settings))  # the control: without the tie each of them can be sent


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}]
)
def test_an_adapter_that_keeps_tied_parameters_tied_is_sent_once(settings: dict[str, Any]) -> None:
    model = with_lora(tiny_model(), ensure_weight_tying=True, **settings)
    actual = sent(model)
    assert "lm_head.weight" not in actual
    plain = sent(tiny_model())
    assert not torch.equal(actual["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])
    embedding = model.base_model.model.model.embed_tokens
    if "target_modules" in settings:
        # Once: PEFT's own merge adds it to the tied weight once for each of its two names.
        expected = embedding.base_layer.weight + embedding.get_delta_weight("default")
    else:
        expected = embedding.modules_to_save["default"].weight
    assert torch.equal(actual["model.embed_tokens.weight"], expected)
