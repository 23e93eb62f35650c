"""An LM head that answers with logprobs: the same as from logits, under whatever wraps the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.algorithm.truncation import Truncation
from shoal.errors import ConfigError
from shoal.testing import tiny_model
from shoal.trainer.forward import packed_logprobs, takes_logits_to_keep
from shoal.trainer.logprob_head import LogprobHead, replace_head
from shoal.trainer.policy_logprobs import PolicyLogprobs
from shoal.types import MicroBatch

VOCABULARY = 320
CPU = torch.device("cpu")

# What the families do after their head: nothing, a cap, a factor, a divisor, a bias in the head.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.37},
    "granite": {"logits_scaling": 3.3},
    "phi": {"num_key_value_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}


def member(family: str) -> Any:
    """A tiny model of the family, with clear preferences."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    if family == "gpt2":
        sizes = {name: sizes[name] for name in ("vocab_size", "pad_token_id", "initializer_range")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | FAMILIES[family]))
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            nn.init.normal_(model.get_output_embeddings().bias)
    return model.double().eval()


def decided(model: Any, *, called: Any = None, **settings: Any) -> PolicyLogprobs:
    logprobs = PolicyLogprobs(model, **({"temperature": 0.8} | settings))
    logprobs.decide(model if called is None else called, vocabulary=VOCABULARY, device=CPU, all_agree=lambda yes: yes)
    return logprobs


def gradients(
    model: Any, called: Any, logprobs: PolicyLogprobs, batch: MicroBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logprobs, and the gradient of some weighted sum of them."""
    model.zero_grad()
    found = logprobs.of_policy(called, batch).logprobs
    (found * torch.linspace(-1, 2, len(found), dtype=found.dtype)).sum().backward()  # type: ignore[no-untyped-call]
    return found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(batch: MicroBatch, model: Any, called: Any = None, *, tolerance: float = 1e-9, **settings: Any) -> None:
    """Logprobs and all gradients are those from logits; `fused=True` raises where it is not fused."""
    called = model if called is None else called
    from_logits = decided(model, called=called, **settings, fused=False)
    expected, plain = gradients(model, called, from_logits, batch)
    fused = decided(model, called=called, **settings, fused=True)
    assert fused.is_fused and not from_logits.is_fused
    found, mine = gradients(model, called, fused, batch)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert mine.keys() == plain.keys()
    for name, value in plain.items():
        assert (mine[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("family", list(FAMILIES))
def test_logprobs_and_gradients_of_each_family_are_those_from_logits(family: str, batch: MicroBatch) -> None:
    # A model's own float32 step (Granite, Cohere) or the inverse of the cap leave a rounding.
    assert_same(batch, member(family), tolerance=1e-6)


def test_truncated_logprobs_too(batch: MicroBatch) -> None:
    truncation = Truncation(top_k=20, top_p=0.9)
    assert_same(batch, tiny_model(dtype=torch.float64), truncation=truncation)
    model = tiny_model(dtype=torch.float64)
    whole, cut = decided(model), decided(model, truncation=truncation)
    assert (whole.of_policy(model, batch).logprobs - cut.of_policy(model, batch).logprobs).abs().max() > 0.1
    # A reference model's are of its whole distribution.
    assert torch.equal(cut.of_reference(model, batch), whole.of_policy(model, batch).logprobs)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_have_the_right_gradient(tied: bool, batch: MicroBatch) -> None:
    assert_same(batch, tiny_model(dtype=torch.float64, tie_word_embeddings=tied))


def test_adapters_around_the_head_leave_it_right(batch: MicroBatch) -> None:
    inner = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    assert_same(batch, get_peft_model(tiny_model(dtype=torch.float64), inner))
    whole = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert_same(batch, get_peft_model(tiny_model(dtype=torch.float64, tie_word_embeddings=False), whole))


def test_an_adapted_head_goes_through_logits() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(tiny_model(dtype=torch.float64, tie_word_embeddings=False), config)
    assert not decided(model).is_fused
    with pytest.raises(ConfigError, match="adapted by LoRA"):
        decided(model, fused=True)


def test_a_head_with_a_hook_goes_through_logits_which_the_hook_expects(batch: MicroBatch) -> None:
    model, shapes = tiny_model(dtype=torch.float64), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[-1]))
    logprobs = decided(model)
    assert not logprobs.is_fused
    logprobs.of_policy(model, batch)
    assert shapes == [VOCABULARY]


class Shifted(nn.Module):
    """A model that does to its logits what Shoal does not know."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1]) % 7
        return output


def test_a_model_that_does_something_else_to_its_logits_is_found_out(batch: MicroBatch) -> None:
    model = Shifted(tiny_model(dtype=torch.float64))
    expected = packed_logprobs(model, batch, temperature=0.8, keeps_logits=False).logprobs
    logprobs = decided(model)
    assert not logprobs.is_fused
    assert torch.equal(logprobs.of_policy(model, batch).logprobs, expected)
    with pytest.raises(ConfigError, match="fused_logprobs"):
        decided(Shifted(tiny_model()), fused=True)


def test_one_rank_that_disagrees_is_enough() -> None:
    logprobs = PolicyLogprobs(model := tiny_model(), temperature=1.0)
    logprobs.decide(model, vocabulary=VOCABULARY, device=CPU, all_agree=lambda yes: False)
    assert not logprobs.is_fused


def test_the_model_is_otherwise_as_it_was() -> None:
    model, other = tiny_model(tie_word_embeddings=False), tiny_model(tie_word_embeddings=False)
    weight, names, ids = model.lm_head.weight, list(model.state_dict()), torch.arange(9)[None]
    logits = model(ids).logits
    assert replace_head(model) is not None and isinstance(model.lm_head, LogprobHead)
    assert model.lm_head.weight is weight and list(model.state_dict()) == names
    assert model.get_output_embeddings() is model.lm_head
    assert torch.equal(model(ids).logits, logits)
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())


def test_a_copy_of_the_model_answers_too(batch: MicroBatch) -> None:
    model = tiny_model(dtype=torch.float64)
    logprobs = decided(model)
    other = copy.deepcopy(model)
    assert other.lm_head.weight is not model.lm_head.weight
    assert torch.equal(logprobs.of_reference(other, batch), logprobs.of_policy(model, batch).logprobs)


def test_a_model_without_logits_to_keep_answers_from_the_rows_that_count(batch: MicroBatch) -> None:
    class All(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.get_output_embeddings = model, model.get_output_embeddings

        def forward(self, input_ids: Any, position_ids: Any, use_cache: bool) -> Any:
            return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    model = All(tiny_model(dtype=torch.float64))
    assert not takes_logits_to_keep(model)
    assert_same(batch, model)


def test_under_autocast_the_products_are_in_bfloat16_as_from_logits(batch: MicroBatch) -> None:
    model = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = decided(model, fused=False).of_policy(model, batch).logprobs
        found = decided(model, fused=True).of_policy(model, batch).logprobs
    exact = decided(model).of_policy(model, batch).logprobs
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - exact).abs().max() > 1e-3  # the control: bfloat16 shows


def test_compiled_models_answer_too(batch: MicroBatch) -> None:
    model = tiny_model(dtype=torch.float64)
    assert_same(batch, model, torch.compile(model, backend="eager"), tolerance=1e-8)


def test_gradient_checkpointing_does_not_disturb_it(batch: MicroBatch) -> None:
    model = tiny_model(dtype=torch.float64)
    model.gradient_checkpointing_enable()
    model.train()
    assert_same(batch, model)


def shard(model: Any, **policy: Any) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model, mp_policy=MixedPrecisionPolicy(**policy))


def full(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value.full_tensor() for name, value in values.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_fsdp2_gathers_the_head_and_finds_its_gradient(one_process_group: None, tied: bool, batch: MicroBatch) -> None:
    plain = tiny_model(dtype=torch.float64, tie_word_embeddings=tied)
    expected, gradient = gradients(plain, plain, decided(plain, fused=False), batch)
    model = tiny_model(dtype=torch.float64, tie_word_embeddings=tied)
    logprobs = PolicyLogprobs(model, temperature=0.8, fused=True)
    model = shard(model)
    logprobs.decide(model, vocabulary=VOCABULARY, device=CPU, all_agree=lambda yes: yes)
    found, mine = gradients(model, model, logprobs, batch)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for name, value in full(mine).items():
        torch.testing.assert_close(value, gradient[name], rtol=1e-8, atol=1e-10)


def test_fsdp2s_output_in_bfloat16_costs_the_logprobs_no_digit(one_process_group: None, batch: MicroBatch) -> None:

    def with_output(dtype: torch.dtype | None) -> torch.Tensor:
        model = tiny_model()
        logprobs = PolicyLogprobs(model, temperature=0.8, fused=True)
        model = shard(model, output_dtype=dtype)
        logprobs.decide(model, vocabulary=VOCABULARY, device=CPU, all_agree=lambda yes: yes)
        return logprobs.of_policy(model, batch).logprobs.detach()

    exact = with_output(None)
    assert torch.equal(with_output(torch.bfloat16), exact)
    assert not torch.equal(exact.bfloat16().float(), exact)  # the control


def test_a_run_trains_alike_with_and_without_logits(make_trainer: Callable[..., Any]) -> None:
    weights = {}
    for fused in (True, False):
        model = tiny_model(dtype=torch.float64)
        trainer = make_trainer(model=model, fused_logprobs=fused, beta=0.1, top_k=50, top_p=0.95)
        trainer.train()
        assert trainer._logprobs.is_fused is fused
        weights[fused] = model.state_dict()
        # The engine's logprobs are those of the same distribution.
        gap = trainer.state.log_history[0]["sampling/sampling_logp_difference/max"]
        assert gap < 1e-5
    assert weights[True].keys() == weights[False].keys()
    for name, value in weights[False].items():
        torch.testing.assert_close(weights[True][name], value, rtol=1e-7, atol=1e-9)
