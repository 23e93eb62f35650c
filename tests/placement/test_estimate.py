"""Sizes and times of layouts: what they are made of, how they move, and what is proposed or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.bench.shapes import SHAPES, qwen3_config
from shoal.errors import PlacementError
from shoal.placement.architecture import Architecture, architecture_from_config
from shoal.placement.estimate import DEDICATED_SHARE, FILLED_SHARE, Estimate, Layout, estimate, with_best_budget
from shoal.placement.gpu_kinds import find_gpu_kind, known_gpu_kind
from shoal.placement.propose import check_fits, layouts, propose, settings_of
from shoal.placement.step_time import Workload, generation_seconds, publish_seconds, training_seconds
from shoal.placement.trainer_memory import TrainerSetup, estimate_trainer_memory

QWEN3_8B = architecture_from_config(qwen3_config(SHAPES["qwen3-8b"]).to_dict())
QWEN3_1_7B = replace(
    QWEN3_8B,
    hidden=2048,
    intermediate=6144,
    num_layers=28,
    num_heads=16,
    vocabulary=49152,
    is_tied=True,
    attention=tuple(
        replace(linear, inputs=min(linear.inputs, 2048), outputs=min(linear.outputs, 2048))
        for linear in QWEN3_8B.attention
    ),
    dense_mlp=tuple(replace(m, inputs=m.inputs // 2, outputs=m.outputs // 2) for m in QWEN3_8B.dense_mlp),
)
H100 = known_gpu_kind("H100")
H200 = known_gpu_kind("H200")
WORK = Workload(num_prompts=32, num_generations=8, prompt_tokens=64, completion_tokens=512, mean_completion_tokens=510)
ALL = ("ddp", "fsdp2")
LORA = TrainerSetup(method="lora")


def _total(found: Estimate, role: str) -> int:
    return next(device.total for device in found.devices if device.role == role)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("GPU", None),
    ],
)
def test_a_product_s_name_is_of_one_kind(name: str, kind: str | None) -> None:
    found = find_gpu_kind(name)
    assert (found.name if found else None) == kind


def test_full_fine_tuning_keeps_sixteen_bytes_a_parameter_and_each_process_of_ddp_four_more() -> None:
    alone = estimate_trainer_memory(QWEN3_1_7B, TrainerSetup())
    assert alone.weights + alone.gradients + alone.optimizer == 16 * QWEN3_1_7B.num_parameters
    two = estimate_trainer_memory(QWEN3_1_7B, TrainerSetup(num_ranks=2))
    assert two.gradients == 2 * alone.gradients


def test_an_adapter_leaves_gradients_and_moments_for_its_own_parameters_only() -> None:
    found = estimate_trainer_memory(QWEN3_1_7B, TrainerSetup(method="lora", lora_rank=8))
    adapter = QWEN3_1_7B.lora_parameters(8)
    assert found.gradients + found.optimizer == 12 * adapter
    assert found.weights == 4 * (QWEN3_1_7B.num_parameters + adapter)


@given(ranks=st.integers(2, 64))
def test_shards_add_up_to_the_whole(ranks: int) -> None:
    total = QWEN3_8B.num_parameters
    fsdp = estimate_trainer_memory(QWEN3_8B, TrainerSetup(sharding="fsdp2", num_ranks=ranks))
    assert 0 <= ranks * (fsdp.weights + fsdp.gradients + fsdp.optimizer) - 16 * total < 3 * ranks
    zero = estimate_trainer_memory(QWEN3_8B, TrainerSetup(sharding="zero3", num_ranks=ranks))
    # DeepSpeed's own estimate: 18 bytes a parameter.
    assert 0 <= ranks * (zero.weights + zero.gradients + zero.optimizer) - 18 * total < 3 * ranks


@pytest.mark.parametrize("compiled", [True, False])
def test_checkpointing_saves_activations_and_costs_time(compiled: bool) -> None:
    recompute, keep = TrainerSetup(compiled=compiled), TrainerSetup(compiled=compiled, checkpoints=False)
    assert (
        estimate_trainer_memory(QWEN3_1_7B, recompute).activations
        < estimate_trainer_memory(QWEN3_1_7B, keep).activations / 5
    )
    slow, flops = training_seconds(QWEN3_1_7B, H100, recompute, WORK)
    fast, same_flops = training_seconds(QWEN3_1_7B, H100, keep, WORK)
    assert fast < slow < 8 / 6 * fast and flops == same_flops


@settings(deadline=None)
@given(smaller=st.integers(1024, 40_000), larger=st.integers(1024, 40_000))
def test_a_larger_budget_never_takes_less_memory(smaller: int, larger: int) -> None:
    smaller, larger = sorted((smaller, larger))
    for keeps in (True, False):
        few = TrainerSetup(micro_batch_tokens=smaller, keeps_logits=keeps)
        many = replace(few, micro_batch_tokens=larger)
        assert estimate_trainer_memory(QWEN3_8B, few).total <= estimate_trainer_memory(QWEN3_8B, many).total


@pytest.mark.parametrize(("shape", "tokens_per_s"), [("qwen3-1.7b", 34_372), ("qwen3-1.4b", 36_300)])
def test_generation_comes_near_what_was_measured_on_an_h200(shape: str, tokens_per_s: float) -> None:
    # `shoal bench rollouts` and `shoal bench step` of 2026-11-29; one number was fitted to the first.
    model = architecture_from_config(qwen3_config(SHAPES[shape]).to_dict())
    work = replace(WORK, completion_tokens=512, mean_completion_tokens=512)
    seconds = generation_seconds(model, H200, work, num_engines=1, tensor_parallel_size=1, kv_tokens=500_000)
    assert 256 * 512 / seconds == pytest.approx(tokens_per_s, rel=0.1)


@pytest.mark.parametrize(("shape", "measured_s"), [("qwen3-0.6b", 0.0178), ("qwen3-8b", 0.0602)])
def test_publishes_come_near_what_was_measured_over_cuda_ipc(shape: str, measured_s: float) -> None:
    model = architecture_from_config(qwen3_config(SHAPES[shape]).to_dict())
    seconds = publish_seconds(model, H200, num_ranks=1, num_engines=1, num_workers=1, is_colocated=True)
    assert seconds == pytest.approx(measured_s, rel=0.02)


def test_engines_that_share_memory_with_less_of_a_cache_take_longer() -> None:
    times = [
        generation_seconds(QWEN3_1_7B, H100, WORK, num_engines=1, tensor_parallel_size=1, kv_tokens=tokens)
        for tokens in (5_000, 50_000, 500_000)
    ]
    assert times[0] > times[1] > times[2]


def test_a_dedicated_engine_gets_its_default_share_and_a_sleeping_one_what_a_resting_trainer_leaves() -> None:
    setup = TrainerSetup(micro_batch_tokens=2048)
    work = replace(WORK, completion_tokens=4096)  # all at once would fill any cache
    apart = estimate(QWEN3_1_7B, H100, setup, Layout(num_trainers=1, num_engines=1), work)
    assert apart.engine_share == DEDICATED_SHARE and not apart.problem
    shared = Layout(num_trainers=1, num_engines=1, is_colocated=True)
    awake = estimate(QWEN3_1_7B, H100, setup, shared, work)
    asleep = estimate(QWEN3_1_7B, H100, setup, replace(shared, sleeps=True), work)
    offloaded = estimate(QWEN3_1_7B, H100, setup, replace(shared, sleeps=True, offloads_optimizer=True), work)
    assert awake.kv_tokens < asleep.kv_tokens < offloaded.kv_tokens < apart.kv_tokens
    (device,) = asleep.devices
    assert device.resting is not None and "gradients" not in device.resting and "KV cache" not in device.parts


@pytest.mark.parametrize("sleeps", [False, True])
def test_an_engine_beside_a_trainer_takes_no_more_than_a_step_can_use(sleeps: bool) -> None:
    layout = Layout(num_trainers=2, num_engines=2, is_colocated=True, sleeps=sleeps)
    found = with_best_budget(QWEN3_1_7B, H200, TrainerSetup(), layout, WORK)
    at_once = WORK.num_samples // 2 * WORK.longest
    assert at_once <= found.kv_tokens <= 1.6 * at_once
    # The rest is the trainer's: long passes, with nothing computed again.
    assert found.setup.num_recomputed(QWEN3_1_7B) == 0 and found.setup.micro_batch_tokens >= 16_384
    twice = with_best_budget(QWEN3_1_7B, H200, TrainerSetup(), replace(layout, num_engines=1), WORK)
    assert twice.kv_tokens > 1.5 * found.kv_tokens
    given = estimate(QWEN3_1_7B, H200, found.setup, replace(layout, engine_share=0.2), WORK)
    assert given.engine_share == 0.2


def test_what_does_not_fit_is_refused_with_the_largest_parts_and_what_would_fit() -> None:
    setup = TrainerSetup()
    asked = with_best_budget(QWEN3_8B, H100, setup, Layout(num_trainers=1, num_engines=7), WORK)
    fitting = propose(QWEN3_8B, H100, 8, setup, WORK, shardings=ALL)
    with pytest.raises(PlacementError, match=r"a trainer GPU needs .*optimizer 61\.0.*What would fit: .*FSDP2"):
        check_fits(asked, QWEN3_8B, H100, WORK, fitting)
    # With one GPU nothing but an adapter fits.
    alone = with_best_budget(QWEN3_8B, H100, setup, Layout(num_trainers=1, num_engines=1, is_colocated=True), WORK)
    with pytest.raises(PlacementError, match="What would fit: a LoRA adapter"):
        check_fits(alone, QWEN3_8B, H100, WORK, propose(QWEN3_8B, H100, 1, setup, WORK, shardings=ALL))


@settings(max_examples=20, deadline=None)
@given(num_gpus=st.integers(1, 16))
def test_every_layout_uses_every_gpu(num_gpus: int) -> None:
    for layout in layouts(QWEN3_8B, num_gpus):
        used = layout.num_trainers if layout.is_colocated else layout.num_trainers + layout.num_workers
        assert used == num_gpus and layout.num_engines >= 1


@pytest.mark.parametrize("num_gpus", [2, 4, 8])
def test_proposals_fit_and_the_fastest_is_first(num_gpus: int) -> None:
    found = propose(QWEN3_1_7B, H100, num_gpus, TrainerSetup(), WORK, shardings=ALL)
    seconds = [other.time.total for other in found if other.time is not None]
    assert len(seconds) == len(found) == 3 and seconds == sorted(seconds)
    for other in found:
        assert all(device.total <= device.limit for device in other.devices)
        assert other.kv_tokens >= WORK.longest and other.setup.micro_batch_tokens >= WORK.longest


def test_passes_are_long_enough_first_and_then_as_few_blocks_as_possible_are_computed_again() -> None:
    # Long enough is 16k tokens: an 8B model's adapter beside float32 weights, on GPUs with more and more memory.
    apart = Layout(num_trainers=1, num_engines=1)
    sizes = (40, 50, 60, 70, 100, 140, 200, 400)
    found = [with_best_budget(QWEN3_8B, replace(H100, memory_bytes=gib << 30), LORA, apart, WORK) for gib in sizes]
    assert not any(other.problem for other in found)
    tokens = [other.setup.micro_batch_tokens for other in found]
    counts = [other.setup.num_recomputed(QWEN3_8B) for other in found]
    assert tokens == sorted(tokens) and tokens[0] < 16_384 < tokens[-1]
    # To keep the last block costs next to nothing: its backward pass comes first, when no other's activations are made.
    most = QWEN3_8B.num_layers - 1
    assert all(count >= most for count, length in zip(counts, tokens, strict=True) if length < 16_384)
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 4 and counts[-1] == 0
    assert all(count == 0 for count, length in zip(counts, tokens, strict=True) if length > 16_384)


def test_what_is_kept_of_free_will_leaves_room_for_the_estimate_s_error() -> None:
    apart = Layout(num_trainers=1, num_engines=1)
    found = with_best_budget(QWEN3_8B, H100, LORA, apart, WORK)
    count = found.setup.recomputed
    assert count is not None and 0 < count < QWEN3_8B.num_layers
    assert _total(found, "trainer") <= FILLED_SHARE * found.devices[0].limit
    one_more = estimate(QWEN3_8B, H100, replace(found.setup, recomputed=count - 1), apart, WORK)
    assert _total(one_more, "trainer") > FILLED_SHARE * one_more.devices[0].limit


def test_a_number_of_blocks_and_a_budget_that_are_given_stay_as_they_are() -> None:
    apart = Layout(num_trainers=1, num_engines=1)
    given = with_best_budget(QWEN3_1_7B, H100, TrainerSetup(recomputed=7), apart, WORK)
    assert given.setup.recomputed == 7
    fixed = with_best_budget(QWEN3_1_7B, H100, TrainerSetup(), apart, WORK, budget=2000)
    assert fixed.setup.micro_batch_tokens == 2000 and fixed.setup.recomputed == 0
    none = with_best_budget(QWEN3_1_7B, H100, TrainerSetup(checkpoints=False), apart, WORK, budget=2000)
    assert "recompute_num_layers" in settings_of(fixed) and "recompute_num_layers" not in settings_of(none)
    assert none.time == fixed.time


def test_blocks_are_taken_for_compiled_where_the_trainer_compiles_them() -> None:
    layout, mixture = Layout(num_trainers=2, num_engines=1), replace(QWEN3_1_7B, num_moe_layers=28, num_experts=8)

    def is_compiled(model: Architecture, setup: TrainerSetup) -> bool:
        return estimate(model, H100, setup, layout, WORK).setup.compiled

    assert is_compiled(QWEN3_1_7B, TrainerSetup()) and is_compiled(QWEN3_1_7B, TrainerSetup(sharding="fsdp2"))
    assert not is_compiled(QWEN3_1_7B, TrainerSetup(sharding="zero3"))
    assert not is_compiled(QWEN3_1_7B, TrainerSetup(compiled=False))
    assert not is_compiled(mixture, TrainerSetup())


def test_more_gpus_are_never_slower() -> None:
    best = [
        propose(QWEN3_1_7B, H100, num_gpus, TrainerSetup(), WORK, shardings=ALL)[0].time for num_gpus in (1, 2, 4, 8)
    ]
    totals = [time.total for time in best if time is not None]
    assert len(totals) == 4 and totals == sorted(totals, reverse=True)
