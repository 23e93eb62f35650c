"""Packed attention: which implementation is chosen, and a variable-length kernel against SDPA's block mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from shoal import GRPOConfig
from shoal.errors import ConfigError
from shoal.testing import tiny_model
from shoal.trainer.attention import (
    VARLEN,
    Available,
    boundaries,
    choose_attention,
    fits_varlen,
    register_varlen,
    takes_boundaries,
    varlen_attention,
    varlen_kernel,
)
from shoal.trainer.forward import packed_logprobs, packs_exactly
from shoal.trainer.model import load_policy
from shoal.types import MicroBatch

EVERYTHING = Available(flash_attention_3=True, flash_attention_2=True, varlen=True)
STAND_IN = "varlen_stand_in"


class StandIn:
    """`varlen_attn` on the CPU: a loop over sequences, each with torch's plain causal attention."""

    def __init__(self) -> None:
        self.boundaries: list[torch.Tensor] = []

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
        max_q: int, max_k: int, *, scale: float | None, window_size: tuple[int, int],
    ) -> torch.Tensor:  # fmt: skip
        assert window_size == (-1, 0) and cu_q.dtype == torch.int32 and cu_k is cu_q
        assert max_q == max_k == int(cu_q.diff().max()) and int(cu_q[-1]) == len(query)
        self.boundaries.append(cu_q)
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x[start:end].transpose(0, 1)[None] for x in (query, key, value)),
                is_causal=True, scale=scale, enable_gqa=True,
            )[0].transpose(0, 1)
            for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)
        ]  # fmt: skip
        return torch.cat(parts)


def run(model: Any, batch: MicroBatch, *, told: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    found = packed_logprobs(model, batch, temperature=1.0, keeps_logits=True, takes_boundaries=told).logprobs
    found.sum().backward()  # type: ignore[no-untyped-call]
    return found.detach(), {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_variable_length_kernel_gives_what_the_block_mask_gives(
    told: bool, checkpointing: bool, batch: MicroBatch
) -> None:
    kernel = StandIn()
    register_varlen(kernel, STAND_IN)
    plain = tiny_model(dtype=torch.float64, attn_implementation="sdpa").train()
    model = tiny_model(dtype=torch.float64, attn_implementation=STAND_IN).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected, gradients = run(plain, batch)
    found, mine = run(model, batch, told=told)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for name, value in gradients.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-8, atol=1e-10)
    assert kernel.boundaries[0].tolist() == [0, 2, 14, 27, 39, 71, 94]
    if told:
        # Computed once, and not again in each layer.
        assert len({id(places) for places in kernel.boundaries}) == 1 and len(kernel.boundaries) >= 2
    wrong = torch.tensor([0, 94], dtype=torch.int32)
    attention = {"cu_seq_lens_q": wrong, "cu_seq_lens_k": wrong, "max_length_q": 94, "max_length_k": 94}
    with torch.no_grad():  # the control: one long sequence
        ids, positions = batch.input_ids[None], batch.position_ids[None]
        logits = model(input_ids=ids, position_ids=positions, use_cache=False, **attention).logits
        assert (logits - plain(input_ids=ids, position_ids=positions, use_cache=False).logits).abs().max() > 0.1


def test_rows_without_positions_are_a_sequence_each_and_packing_is_found_to_be_exact() -> None:
    register_varlen(StandIn(), STAND_IN)
    model = tiny_model(dtype=torch.float64, attn_implementation=STAND_IN).eval()
    plain = tiny_model(dtype=torch.float64, attn_implementation="sdpa").eval()
    ids = torch.arange(24).reshape(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits, rtol=1e-10, atol=1e-10
        )
    assert packs_exactly(model)


def test_boundaries_are_where_positions_start_again() -> None:
    found = boundaries(torch.tensor([0, 0, 1, 2, 0, 1]))
    assert found["cu_seq_lens_q"].tolist() == [0, 1, 4, 6] and found["cu_seq_lens_q"].dtype == torch.int32
    assert found["cu_seq_lens_k"] is found["cu_seq_lens_q"]
    assert (found["max_length_q"], found["max_length_k"]) == (3, 3)
    assert boundaries(torch.arange(5))["cu_seq_lens_q"].tolist() == [0, 5]


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"sliding_window": 8}, "sliding_window"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "later tokens"),
        ({"attention_mask": torch.ones(1, 4)}, "mask"),
    ],
)
def test_attention_of_another_kind_is_refused_rather_than_computed_wrongly(keywords: Any, named: str) -> None:
    states = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ConfigError, match=named):
        varlen_attention(StandIn())(
            torch.nn.Identity(), states, states, states, **({"attention_mask": None} | keywords)
        )
    out, _ = varlen_attention(StandIn())(torch.nn.Identity(), states, states, states, None)
    assert out.shape == (1, 4, 2, 8)


def config_of(kind: str, **settings: Any) -> Any:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return AutoConfig.for_model(kind, **sizes | settings)


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        (config_of("llama"), True),
        (config_of("qwen2"), True),
        (config_of("qwen3", head_dim=128), True),
        (config_of("mistral", sliding_window=None), True),
        (config_of("mistral", sliding_window=8), False),
        (config_of("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1), False),
        (config_of("gemma2", head_dim=16), False),
        (config_of("gemma3_text", head_dim=16), False),
        (config_of("gpt_oss", head_dim=64), False),
        (config_of("llama", attention_dropout=0.1), False),
        (config_of("llama", head_dim=12), False),
        (config_of("llama", head_dim=512), False),
        (config_of("deepseek_v3"), False),
    ],
)
def test_only_plain_causal_attention_goes_to_torchs_kernel(config: Any, fits: bool) -> None:
    assert fits_varlen(config) is fits


def choose(available: Available = EVERYTHING, **changes: Any) -> str | None:
    keywords = {
        "config": config_of("llama"),
        "model_class": LlamaForCausalLM,
        "device_type": "cuda",
        "computes_in_16_bits": True,
    }
    return choose_attention(**(keywords | changes), available=available)


def test_the_best_implementation_that_is_there_and_fits_is_chosen() -> None:
    from dataclasses import replace

    assert choose() == "flash_attention_3"
    assert choose(without_3 := replace(EVERYTHING, flash_attention_3=False)) == "flash_attention_2"
    assert choose(without_2 := replace(without_3, flash_attention_2=False)) == VARLEN
    assert choose(replace(without_2, varlen=False)) is None
    assert choose(without_2, config=config_of("mistral", sliding_window=8)) is None
    assert choose(device_type="cpu") is None
    assert choose(computes_in_16_bits=False) is None  # flash kernels take no float32
    assert choose(model_class=None) is None


def test_models_are_told_boundaries_only_if_their_attention_takes_them() -> None:
    assert not takes_boundaries(tiny_model())
    model = tiny_model()
    model.config._attn_implementation_internal = VARLEN
    assert takes_boundaries(model)


def test_this_torch_has_the_kernel_that_is_called() -> None:
    assert varlen_kernel() is not None  # an argument that was renamed would end here


def test_the_users_choice_of_attention_stands(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)

    def loaded(**settings: Any) -> Any:
        return load_policy(str(tmp_path), GRPOConfig(output_dir="unused", use_cpu=True, **settings)).config

    assert loaded()._attn_implementation == "sdpa"
    assert loaded(model_init_kwargs={"attn_implementation": "eager"})._attn_implementation == "eager"
