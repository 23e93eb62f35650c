"""A packed forward pass gives each sequence the logprobs that it has alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.data.micro_batch import build_micro_batch
from shoal.testing import tiny_model
from shoal.testing.sequences import EDGES_OF_PACKING, random_sequences
from shoal.trainer.forward import packed_logprobs, takes_logits_to_keep
from shoal.types import MicroBatch, Sequence

ATTENTION = ["sdpa", "eager"]
# transformers' eager attention takes its softmax in float32 whatever the model's type.
TOLERANCE = {"sdpa": 1e-10, "eager": 5e-6}

# Families whose attention and positions differ; hybrids with recurrent layers cannot be packed this way.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "phi3": {},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "olmo2": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
}


class AllLogits(nn.Module):
    """A model that cannot be asked for the logits of some positions only."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> Any:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)


def pack(sequences: list[Sequence]) -> MicroBatch:
    return build_micro_batch(sequences, [1.0] * len(sequences))


def model_with(attention: str = "sdpa", **settings: Any) -> Any:
    model = tiny_model(dtype=torch.float64, attn_implementation=attention, **settings)
    assert model.config._attn_implementation == attention
    return model


def family_member(family: str) -> Any:
    """A tiny model of another architecture, with clear preferences."""
    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if family in ("gpt2", "gpt_neox") else 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    if family == "gpt2":
        sizes = {name: sizes[name] for name in ("vocab_size", "pad_token_id", "initializer_range")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | FAMILIES[family]))
    return model.double().eval()


@torch.no_grad()
def alone(model: Any, sequences: list[Sequence], temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies of all completions, each sequence by itself."""
    logprobs, entropies = [], []
    for sequence in sequences:
        ids = torch.from_numpy(sequence.token_ids)
        logits = model(input_ids=ids[None]).logits[0, sequence.prompt_length - 1 : -1] / temperature
        distribution = torch.distributions.Categorical(logits=logits)
        logprobs.append(distribution.log_prob(ids[sequence.prompt_length :]))
        entropies.append(distribution.entropy())
    return torch.cat(logprobs), torch.cat(entropies)


@torch.no_grad()
def packed(model: Any, batch: MicroBatch, temperature: float = 1.0, *, keeps_logits: bool = True) -> torch.Tensor:
    return packed_logprobs(model, batch, temperature=temperature, keeps_logits=keeps_logits).logprobs


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("keeps_logits", [True, False])
def test_packed_logprobs_and_entropies_are_those_of_each_sequence_alone(
    attention: str, temperature: float, keeps_logits: bool
) -> None:
    model, sequences = model_with(attention), random_sequences()
    called = model if keeps_logits else AllLogits(model)
    with torch.no_grad():
        found = packed_logprobs(called, pack(sequences), temperature=temperature, keeps_logits=keeps_logits)
    logprobs, entropies = alone(model, sequences, temperature)
    assert found.logprobs.dtype == torch.float64
    torch.testing.assert_close(found.logprobs, logprobs, rtol=0, atol=TOLERANCE[attention])
    torch.testing.assert_close(found.entropy, entropies, rtol=0, atol=TOLERANCE[attention])


@pytest.mark.parametrize("attention", ATTENTION)
def test_without_positions_that_start_again_the_sequences_would_not_be_alone(attention: str) -> None:
    model, sequences = model_with(attention), random_sequences()
    batch = pack(sequences)
    running = replace(batch, position_ids=torch.arange(batch.num_tokens))
    assert (packed(model, running) - alone(model, sequences)[0]).abs().max() > 0.1


def test_another_temperature_gives_other_logprobs() -> None:
    model, batch = model_with(), pack(random_sequences())
    assert (packed(model, batch, 1.0) - packed(model, batch, 0.6)).abs().max() > 0.1


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("changed", range(len(EDGES_OF_PACKING)))
def test_changing_one_sequence_leaves_the_others_exactly_as_they_were(attention: str, changed: int) -> None:
    model, sequences = model_with(attention), random_sequences()
    other = [*sequences]
    other[changed] = random_sequences(seed=1)[changed]
    before, after = packed(model, pack(sequences)), packed(model, pack(other))
    mine = pack(sequences).sequence_index == changed
    assert torch.equal(before[~mine], after[~mine])
    assert not torch.equal(before[mine], after[mine])


@pytest.mark.parametrize("attention", ATTENTION)
def test_with_running_positions_a_change_would_reach_the_sequences_after_it(attention: str) -> None:
    model, sequences = model_with(attention), random_sequences()
    other = [random_sequences(seed=1)[0], random_sequences(seed=1)[1], *sequences[2:]]
    positions = torch.arange(pack(sequences).num_tokens)
    before = packed(model, replace(pack(sequences), position_ids=positions))
    after = packed(model, replace(pack(other), position_ids=positions))
    later = pack(sequences).sequence_index > 1
    assert (before[later] - after[later]).abs().max() > 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_changes_no_logprob(training: bool) -> None:
    model, sequences = model_with(), random_sequences()
    model.gradient_checkpointing_enable()
    model.train(training)
    found = packed_logprobs(model, pack(sequences), temperature=1.0, keeps_logits=True).logprobs
    torch.testing.assert_close(found.detach(), alone(model.eval(), sequences)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_architectures_keep_packed_sequences_apart_too(family: str) -> None:
    model, sequences = family_member(family), random_sequences()
    batch = pack(sequences)
    expected = alone(model, sequences)[0]
    torch.testing.assert_close(packed(model, batch), expected, rtol=0, atol=1e-10)
    running = replace(batch, position_ids=torch.arange(batch.num_tokens))
    assert (packed(model, running) - expected).abs().max() > 1e-3


def test_a_model_is_asked_for_some_logits_only_if_it_can_be() -> None:
    assert takes_logits_to_keep(tiny_model())
    assert takes_logits_to_keep(get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM")))
    assert not takes_logits_to_keep(AllLogits(tiny_model()))


def test_models_that_let_packed_sequences_see_one_another_are_found_out() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from shoal.trainer.forward import packs_exactly

    assert packs_exactly(tiny_model())
    assert not packs_exactly(BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=2)))
