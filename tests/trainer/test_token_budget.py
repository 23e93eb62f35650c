"""The token budget grows with memory, shrinks with what a token costs, and never spends more than there is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from shoal.testing import tiny_model
from shoal.trainer import packing_limit
from shoal.trainer.exchange import Exchange
from shoal.trainer.packing_limit import PackingLimit
from shoal.trainer.token_budget import PassShape, bytes_to_come, pass_shape, plan_pass, tokens_that_fit

GIB = 1 << 30
EIGHT_B = AutoConfig.for_model(
    "qwen3", hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    intermediate_size=12288, vocab_size=151936,
)  # fmt: skip


def shape_of(config: Any = EIGHT_B, **changes: Any) -> PassShape:
    keywords = {"element_bytes": 2, "checkpointing": True, "fused": True, "has_boundaries": True, "compiled": True}
    return pass_shape(config, **(keywords | changes))


@given(st.integers(1, 10**7), st.sampled_from([0, 1, 3]), st.integers(0, 10**9), st.integers(0, 10**12))
def test_what_fits_costs_no_more_than_its_share_and_one_token_more_would(
    per_token: int, per_pair: int, fixed: int, free: int
) -> None:
    shape = PassShape(per_token_bytes=per_token, per_pair_bytes=per_pair, fixed_bytes=fixed)

    def cost(tokens: int) -> float:
        return fixed + per_token * tokens + per_pair * tokens**2

    tokens = tokens_that_fit(shape, free)
    assert tokens >= 0
    if tokens:
        assert cost(tokens) <= 0.7 * free * (1 + 1e-9) + 1
    if fixed < 0.7 * free:
        assert cost(tokens + 2) > 0.7 * free * (1 - 1e-9)


def test_each_saving_makes_room_for_more_tokens() -> None:
    best = tokens_that_fit(shape_of(), 20 * GIB)
    for costly in ({"checkpointing": False}, {"fused": False}, {"has_boundaries": False}, {"element_bytes": 4}):
        assert 0 < tokens_that_fit(shape_of(**costly), 20 * GIB) < best, costly
    assert tokens_that_fit(shape_of(), 40 * GIB) > 2 * best * 0.95
    assert tokens_that_fit(shape_of(), GIB // 4) == 0


def test_with_more_memory_fewer_blocks_are_computed_again_and_then_passes_grow() -> None:
    plans = [plan_pass(shape_of(), gib * GIB, longest=4096) for gib in (1, 10, 30, 60, 100, 160, 400)]
    recomputed = [plan.recomputed for plan in plans]
    assert recomputed == sorted(recomputed, reverse=True)
    assert recomputed[0] == 36 and recomputed[-1] == 0
    assert any(0 < count < 36 for count in recomputed)
    assert plans[0].tokens == 4096  # what has to fit in any case
    for plan, gib in zip(plans[1:], (10, 30, 60, 100, 160, 400), strict=True):
        kept = shape_of().kept_bytes * (36 - plan.recomputed)
        assert (shape_of().per_token_bytes + kept) * plan.tokens < 0.7 * gib * GIB
        assert plan.recomputed == 36 or plan.tokens >= 16_384
    assert plans[-1].tokens > 2 * 16_384


def test_blocks_are_computed_again_as_the_settings_say() -> None:
    for count, expected in ((0, 0), (7, 7), (36, 36), (99, 36)):
        plan = plan_pass(shape_of(), 100 * GIB, longest=100, recomputed=count)
        assert plan.recomputed == expected
    few, many = (plan_pass(shape_of(), 100 * GIB, longest=100, recomputed=count) for count in (0, 36))
    assert many.tokens > 3 * few.tokens > 0


def test_what_keeps_everything_computes_nothing_again() -> None:
    shape = shape_of(checkpointing=False)
    plan = plan_pass(shape, 100 * GIB, longest=100)
    assert plan.recomputed == 0
    assert plan.tokens == tokens_that_fit(shape, 100 * GIB)


def test_the_parts_that_dominate_are_counted() -> None:
    # With checkpointing: 36 inputs of blocks in float32. Without: every block's products too.
    assert shape_of().per_token_bytes > 36 * 4 * 4096
    assert shape_of(checkpointing=False).per_token_bytes > 36 * 2 * 4 * 12288
    logits = shape_of(fused=False).per_token_bytes - shape_of().per_token_bytes
    assert logits == 2 * 2 * 151936


def test_a_mixture_of_experts_counts_those_that_a_token_uses() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "moe_intermediate_size": 512}
    few, many = (
        shape_of(AutoConfig.for_model("qwen3_moe", **sizes, num_experts_per_tok=n)).per_token_bytes for n in (1, 8)
    )
    assert many > 4 * few


def test_gradients_and_moments_that_are_not_there_yet_are_to_come() -> None:
    model = tiny_model()
    size = sum(value.numel() * 4 for value in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    assert bytes_to_come(model, optimizer) == 3 * size
    assert bytes_to_come(model, None) == size
    model(torch.arange(5)[None]).logits.sum().backward()
    assert bytes_to_come(model, optimizer) == 2 * size
    optimizer.step()
    assert bytes_to_come(model, optimizer) == 0
    model.requires_grad_(False)
    assert bytes_to_come(model, torch.optim.AdamW([torch.zeros(1)])) == 0


def test_the_limit_is_what_fits_and_at_least_the_longest_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    args: Any = SimpleNamespace(
        max_tokens_per_micro_batch=None,
        device=torch.device("cuda", 0),
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        recompute_num_layers=None,
    )
    found = {}
    for free in (0, 8 * GIB):
        monkeypatch.setattr(packing_limit, "free_gpu_bytes", lambda device, free=free: free)
        limit = PackingLimit(args, Exchange(rank=0, world_size=1))
        limit.measure(model, torch.optim.AdamW(model.parameters()), longest=300, is_fused=True)
        found[free] = limit.tokens
    assert found[0] == 300
    assert found[8 * GIB] is not None and found[8 * GIB] > 1000
