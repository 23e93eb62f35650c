"""The token budget grows with memory, shrinks with what a token costs, and never spends more than there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoConfig, TrainerCallback

from shoal.testing import tiny_model
from shoal.trainer.blocks import find_blocks
from shoal.trainer.exchange import Exchange
from shoal.trainer.packing_limit import PackingLimit
from shoal.trainer.token_budget import (
    PassShape,
    PassUse,
    bytes_to_come,
    improve_plan,
    pass_shape,
    plan_pass,
    tokens_that_fit,
)

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
        kept = (shape_of().lean_bytes if plan.is_lean else shape_of().kept_bytes) * (36 - plan.recomputed)
        assert plan.is_lean or plan.recomputed == 0
        assert (shape_of().per_token_bytes + kept) * plan.tokens < 0.7 * gib * GIB
        assert plan.recomputed == 36 or plan.tokens >= 16_384
    assert plans[-1].tokens > 2 * 16_384


def test_blocks_are_computed_again_as_the_settings_say() -> None:
    for count, expected in ((0, 0), (7, 7), (36, 36), (99, 36)):
        plan = plan_pass(shape_of(), 100 * GIB, longest=100, recomputed=count)
        assert plan.recomputed == expected and plan.is_lean == (count > 0)
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


@dataclass
class PretendedGpu:
    """A GPU on which passes take what `cost` says, not what is estimated."""

    total: int
    cost: Callable[[int, int], float]
    used: int = 0
    most: int = 0

    def free(self) -> int:
        return self.total

    def watch(self) -> None:
        self.used = 0

    def taken(self) -> int:
        return self.used

    def run(self, tokens: int, kept: int) -> None:
        self.used = max(self.used, int(self.cost(tokens, kept)))
        self.most = max(self.most, self.used)


def make_limit(gpu: PretendedGpu, **changes: Any) -> PackingLimit:
    settings: dict[str, Any] = {
        "max_tokens_per_micro_batch": None,
        "device": torch.device("cuda", 0),
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": True,
        "recompute_num_layers": None,
    }
    args: Any = SimpleNamespace(**(settings | changes))
    return PackingLimit(args, Exchange(rank=0, world_size=1), cast(Any, gpu))


def train(limit: PackingLimit, gpu: PretendedGpu, *, longest: int, fills: float = 1.0, batches: int = 12) -> list[int]:
    """Run batches whose passes fill a share of the budget; return how many blocks each recomputed."""
    model = tiny_model()
    blocks = find_blocks(model)
    for block in blocks:
        block.gradient_checkpointing = True  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(model.parameters())
    recomputed = []
    for _ in range(batches):
        limit.measure(model, optimizer, longest=longest, is_fused=True)
        assert limit.tokens is not None
        largest = max(1, int(fills * limit.tokens))
        limit.watch(model, largest=largest)
        recomputed.append(sum(bool(block.gradient_checkpointing) for block in blocks))
        gpu.run(largest, len(blocks) - recomputed[-1])
        limit.end_step()
    return recomputed


def test_the_limit_is_what_fits_and_at_least_the_longest_sequence() -> None:
    found = {}
    for free in (0, 8 * GIB):
        gpu = PretendedGpu(free, lambda tokens, kept: 0)
        limit = make_limit(gpu, gradient_checkpointing=False)
        train(limit, gpu, longest=300, batches=1)
        found[free] = limit.tokens
    assert found[0] == 300
    assert found[8 * GIB] is not None and found[8 * GIB] > 1000


@given(
    free=st.floats(20, 200),
    share=st.floats(0.4, 1.0),
    kept_share=st.floats(0.4, 1.0),
    gradients=st.floats(0, 0.3),
    longest=st.sampled_from([512, 4096, 30_000]),
)
def test_what_passes_took_decides_how_many_blocks_are_kept(
    free: float, share: float, kept_share: float, gradients: float, longest: int
) -> None:
    shape, free_bytes = shape_of(), int(free * GIB)
    held = int(gradients * free_bytes)

    def cost(tokens: int, kept: int) -> float:
        base = share * (shape.fixed_bytes + shape.per_token_bytes * tokens)
        return base + kept_share * shape.lean_bytes * kept * tokens

    plan = plan_pass(shape, free_bytes - held, longest=longest)
    assume(plan.tokens < 16_384 or plan.recomputed)
    before = plan
    for _ in range(50):
        used = int(cost(plan.tokens, 36 - plan.recomputed)) + held
        use = PassUse(tokens=plan.tokens, free_bytes=free_bytes, used_bytes=used, gradient_bytes=held)
        found = improve_plan(plan, shape, use, longest=longest, may_grow=True)
        if found == plan:
            break
        plan = found
        if plan.recomputed > before.recomputed:
            return  # it did not fit even as estimated
    assert found == plan  # it came to an end
    assert plan.tokens >= before.tokens and plan.recomputed <= before.recomputed
    most = cost(plan.tokens, 36 - plan.recomputed) + held
    assert most <= 0.85 * free_bytes or plan == before
    if plan.recomputed:  # not one more, as far as estimates can tell
        assert most + shape.lean_bytes * plan.tokens * max(1.0, share, kept_share) >= 0.85 * free_bytes * 0.999


def test_passes_that_took_more_than_estimated_keep_fewer_blocks() -> None:
    shape = shape_of()
    plan = plan_pass(shape, 60 * GIB, longest=4096)
    assert 0 < plan.recomputed < 36
    use = PassUse(tokens=plan.tokens, free_bytes=60 * GIB, used_bytes=58 * GIB, gradient_bytes=0)
    found = improve_plan(plan, shape, use, longest=4096, may_grow=True)
    assert found.tokens == plan.tokens and found.recomputed > plan.recomputed


def test_a_pass_that_did_not_fill_the_budget_is_reckoned_as_one_that_does() -> None:
    shape = shape_of()
    plan = plan_pass(shape, 60 * GIB, longest=4096)
    whole, half = (
        improve_plan(
            plan,
            shape,
            PassUse(tokens=tokens, free_bytes=60 * GIB, used_bytes=used * GIB, gradient_bytes=0),
            longest=4096,
            may_grow=True,
        )
        for tokens, used in ((plan.tokens, 30), (plan.tokens // 2, 15))
    )
    assert whole == half
    assert whole.recomputed < plan.recomputed


def small_gpu(true_share: float) -> tuple[PretendedGpu, int]:
    """A GPU with room for 16k tokens of the tiny model with the first of its two blocks' activations, by estimate."""
    shape = pass_shape(
        tiny_model().config, element_bytes=4, checkpointing=True, fused=True, has_boundaries=False, compiled=False
    )
    linear = replace(shape, per_pair_bytes=0)
    budget = 16_384
    needs = linear.fixed_bytes + (linear.per_token_bytes + 1.2 * linear.kept_bytes) * budget
    needs += shape.per_pair_bytes * budget**2

    def cost(tokens: int, kept: int) -> float:
        pairs = shape.per_pair_bytes * tokens**2
        return true_share * (shape.fixed_bytes + (shape.per_token_bytes + shape.kept_bytes * kept) * tokens + pairs)

    return PretendedGpu(int(needs / 0.7), cost), budget


def test_a_trainer_keeps_more_blocks_from_the_third_batch_on() -> None:
    gpu, longest = small_gpu(true_share=0.6)
    limit = make_limit(gpu)
    recomputed = train(limit, gpu, longest=longest)
    assert recomputed[:2] == [1, 1] and set(recomputed[2:]) == {0}
    assert gpu.most <= 0.85 * gpu.total


def test_what_the_settings_say_is_not_improved() -> None:
    gpu, longest = small_gpu(true_share=0.6)
    assert set(train(make_limit(gpu, recompute_num_layers=1), gpu, longest=longest)) == {1}
    given = make_limit(gpu, max_tokens_per_micro_batch=longest)
    given.tokens = longest  # as `find` does
    recomputed = train(given, gpu, longest=longest)
    assert recomputed[0] == 1 and recomputed[-1] == 0  # blocks are still chosen
    assert given.tokens == longest


def test_passes_that_tell_little_are_waited_out() -> None:
    gpu, longest = small_gpu(true_share=0.6)
    limit = make_limit(gpu)
    assert set(train(limit, gpu, longest=longest, fills=0.3)) == {1}
    assert train(limit, gpu, longest=longest, fills=0.9)[-1] == 0


def test_a_real_trainer_watches_its_passes_and_keeps_more_of_its_blocks(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(max_steps=5, gradient_checkpointing=True)
    blocks = find_blocks(trainer.model)
    gpu, _ = small_gpu(true_share=0.6)
    watched: list[int] = []
    limit = trainer._limit = make_limit(gpu)  # a GPU for the limit alone; all else runs on the CPU
    limit.tokens = 16_384

    def longest_first(*args: Any, longest: int, **keywords: Any) -> None:
        PackingLimit.measure(limit, *args, longest=16_384, **keywords)

    def watch(*args: Any, largest: int) -> None:
        watched.append(largest)
        PackingLimit.watch(limit, *args, largest=16_384)  # these passes are short, but say as much

    limit.measure, limit.watch = longest_first, watch
    recomputed: list[int] = []

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gpu.run(16_384, kept=1)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            recomputed.append(sum(bool(block.gradient_checkpointing) for block in blocks))

    trainer.add_callback(Steps())
    trainer.train()
    assert recomputed == [1, 1, 0, 0, 0]
    assert len(watched) == 5 and all(0 < count < 500 for count in watched)
