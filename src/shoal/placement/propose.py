"""Search the layouts of a host for those that fit, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from shoal.errors import PlacementError
from shoal.placement.architecture import Architecture
from shoal.placement.estimate import Estimate, Layout, with_best_budget
from shoal.placement.gpu_kinds import GpuKind
from shoal.placement.step_time import Workload
from shoal.placement.trainer_memory import Sharding, TrainerSetup

_TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
_MOST = 3
_NUM_SEARCHED = 64


def propose(
    model: Architecture,
    gpu: GpuKind,
    num_gpus: int,
    setup: TrainerSetup,
    work: Workload,
    *,
    shardings: tuple[Sharding, ...],
) -> tuple[Estimate, ...]:
    """Return the layouts that fit, by the estimated seconds of a step, three at most.

    Args:
        model: The policy.
        gpu: Kind of all GPUs.
        num_gpus: Of the host.
        setup: How it is trained; processes, sharding, token budget and, unless its number is given, recomputed blocks
            are searched.
        work: The step.
        shardings: Which may be used, the preferred first.
    """
    fastest: dict[tuple[int, int, bool], Estimate] = {}
    for layout in layouts(model, min(num_gpus, _NUM_SEARCHED)):
        for sharding in shardings if layout.num_trainers > 1 else ("ddp",):
            found = with_best_budget(model, gpu, replace(setup, sharding=sharding), layout, work)
            if found.time is None:
                continue
            key = (layout.num_trainers, layout.tensor_parallel_size, layout.is_colocated)
            if key not in fastest or _seconds(found) < _seconds(fastest[key]):
                fastest[key] = found
    return tuple(sorted(fastest.values(), key=_seconds)[:_MOST])


def layouts(model: Architecture, num_gpus: int) -> Iterator[Layout]:
    """Yield every way to use all GPUs of a host, engines all alike."""
    for size in _TENSOR_PARALLEL_SIZES:
        if model.num_heads % size or (model.num_kv_heads % size and size % model.num_kv_heads):
            continue
        for trainers in range(1, num_gpus):
            if (num_gpus - trainers) % size == 0:
                engines = (num_gpus - trainers) // size
                yield Layout(num_trainers=trainers, num_engines=engines, tensor_parallel_size=size)
        if num_gpus % size == 0:
            shared = Layout(
                num_trainers=num_gpus, num_engines=num_gpus // size, tensor_parallel_size=size, is_colocated=True
            )
            yield from (shared, replace(shared, sleeps=True), replace(shared, sleeps=True, offloads_optimizer=True))


def check_fits(
    asked: Estimate, model: Architecture, gpu: GpuKind, work: Workload, fitting: tuple[Estimate, ...]
) -> None:
    """Refuse a layout that does not fit.

    Raises:
        PlacementError: What is too large, and what would fit.
    """
    if not asked.problem:
        return
    advice = ", or ".join(settings_of(found) for found in fitting)
    if not advice:
        smaller = _smaller(asked, model, gpu, work)
        advice = smaller or "more GPUs, or GPUs with more memory"
    raise PlacementError(f"{asked.layout.name}: {asked.problem}. What would fit: {advice}.")


def settings_of(found: Estimate) -> str:
    """Write what to set for an estimate."""
    layout, setup = found.layout, found.setup
    words = [f"{layout.num_trainers} trainer process{'es' if layout.num_trainers > 1 else ''}"]
    if layout.num_trainers > 1 and setup.sharding != "ddp":
        words[0] += f" with {setup.sharding.upper()}"
    if layout.is_colocated:
        words.append('vllm_devices="colocate"')
        words.append(f"vllm_gpu_memory_utilization={found.engine_share:.2f}")
    if layout.sleeps:
        words.append("vllm_enable_sleep_mode=True")
    if layout.offloads_optimizer:
        words.append("offload_optimizer_during_rollout=True")
    words.append(f"vllm_tensor_parallel_size={layout.tensor_parallel_size}")
    words.append(f"max_tokens_per_micro_batch={setup.micro_batch_tokens}")
    if setup.recomputed is not None and setup.checkpoints:
        words.append(f"recompute_num_layers={setup.recomputed}")
    return " ".join(words)


def _smaller(asked: Estimate, model: Architecture, gpu: GpuKind, work: Workload) -> str:
    """Look for what fits the same GPUs with less to train or shorter completions."""
    recomputing = replace(asked.setup, checkpoints=True, recomputed=None)
    changes: tuple[tuple[str, TrainerSetup, Workload], ...] = (
        ("gradient checkpointing", recomputing, work),
        ("a LoRA adapter (--method lora)", replace(recomputing, method="lora"), work),
        (
            f"completions of at most {max(1, work.completion_tokens // 4)} tokens",
            recomputing,
            replace(
                work,
                completion_tokens=max(1, work.completion_tokens // 4),
                mean_completion_tokens=max(1.0, work.mean_completion_tokens / 4),
            ),
        ),
    )
    fitting = [
        words
        for words, setup, smaller in changes
        if (setup.method, setup.checkpoints, smaller) != (asked.setup.method, asked.setup.checkpoints, work)
        and not with_best_budget(model, gpu, setup, asked.layout, smaller).problem
    ]
    return ", or ".join(fitting)


def _seconds(found: Estimate) -> float:
    return found.time.total if found.time is not None else float("inf")
