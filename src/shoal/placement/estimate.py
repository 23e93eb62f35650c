"""Memory and time of one layout: which devices train, which generate, whether all of it fits, and in what passes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shoal.placement.architecture import Architecture
from shoal.placement.gpu_kinds import GpuKind
from shoal.placement.step_time import (
    ENOUGH_TOKENS,
    MAX_NUM_SEQS,
    StepTime,
    Workload,
    generation_seconds,
    publish_seconds,
    training_seconds,
)
from shoal.placement.trainer_memory import TrainerSetup, estimate_trainer_memory

_GIB = 1 << 30
# Allowances, none of them measured with Shoal: CUDA context and NCCL of a trainer; the same, CUDA graphs and the
# activations of vLLM's profiling run for an engine; and what a caching allocator cannot use of a device.
TRAINER_RUNTIME_BYTES = 3 * _GIB // 2
ENGINE_RUNTIME_BYTES = 5 * _GIB // 2
UNUSABLE_SHARE = 0.04
SLEEPING_ENGINE_BYTES = _GIB
FILLED_SHARE = 0.85  # of what a device can use, for what need not be there: estimates are within 15 %
DEDICATED_SHARE = 0.9  # the default of vllm_gpu_memory_utilization
# What a publish takes beside the weights (benchmarks/results/2026-11-24-one-h200-weights): 362 MiB at an engine.
ENGINE_PUBLISH_BYTES = 362 << 20
_TRAINER_PUBLISH_BYTES = 12 << 20
_BUDGETS = tuple(1024 * size for size in (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Who gets how many GPUs of one host, all of one kind.

    Attributes:
        num_trainers: Trainer processes, one a GPU.
        num_engines: Engines.
        tensor_parallel_size: GPUs of each.
        is_colocated: Engines are on the trainers' GPUs.
        sleeps: Such engines give their memory back while the trainer works.
        offloads_optimizer: The optimizer is in the host's memory while engines write.
        engine_share: Share of a GPU's memory an engine may take; None for as much as there is, or, where a trainer has
            the rest, as a step can use.
    """

    num_trainers: int
    num_engines: int
    tensor_parallel_size: int = 1
    is_colocated: bool = False
    sleeps: bool = False
    offloads_optimizer: bool = False
    engine_share: float | None = None

    @property
    def num_workers(self) -> int:
        """GPUs of all engines."""
        return self.num_engines * self.tensor_parallel_size

    @property
    def name(self) -> str:
        """In a few words."""
        engines = f"{self.num_engines} engine{'s' if self.num_engines > 1 else ''}"
        tp = f" of TP {self.tensor_parallel_size}" if self.tensor_parallel_size > 1 else ""
        where = f"on the same GPU{'s' if self.num_workers > 1 else ''}" if self.is_colocated else "beside"
        trainers = f"{self.num_trainers} trainer process{'es' if self.num_trainers > 1 else ''}"
        asleep = ", asleep in training" if self.sleeps else ""
        return f"{trainers}, {engines}{tp} {where}{asleep}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEstimate:
    """One kind of device.

    Attributes:
        role: `"trainer"`, `"engine"` or `"shared"`.
        count: GPUs of this role.
        parts: Bytes by part, at the moment when they are most.
        resting: Bytes in the other phase of a shared device whose engine sleeps; None for the others.
        limit: Bytes that can be used.
    """

    role: str
    count: int
    parts: Mapping[str, int]
    resting: Mapping[str, int] | None
    limit: int

    @property
    def total(self) -> int:
        """Bytes at the fuller of the two moments."""
        return max(sum(self.parts.values()), sum((self.resting or {}).values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a layout would need and do.

    Attributes:
        layout: The layout.
        setup: The trainers.
        devices: One entry for each role.
        kv_tokens: Tokens in the KV cache of one engine.
        engine_share: vllm_gpu_memory_utilization.
        time: Of a step; None where it does not fit.
        problem: Why it does not fit; empty where it does.
    """

    layout: Layout
    setup: TrainerSetup
    devices: tuple[DeviceEstimate, ...]
    kv_tokens: int
    engine_share: float
    time: StepTime | None
    problem: str


def estimate(model: Architecture, gpu: GpuKind, setup: TrainerSetup, layout: Layout, work: Workload) -> Estimate:
    """Estimate a layout with the given token budget."""
    compiled = setup.compiled and _can_compile(model, setup)
    setup = replace(setup, num_ranks=layout.num_trainers, compiled=compiled)
    limit = int(gpu.memory_bytes * (1 - UNUSABLE_SHARE))
    trainer = _trainer_parts(model, setup)
    weights = -(-2 * model.num_parameters // layout.tensor_parallel_size)
    fixed = {"engine weights": weights, "engine runtime": ENGINE_RUNTIME_BYTES, "engine publish": ENGINE_PUBLISH_BYTES}
    beside = _beside_engine(model, setup, layout, trainer)
    room = limit - sum(beside.values())
    if layout.is_colocated:
        room = min(room, int((sum(fixed.values()) + _enough_cache(model, layout, work)) / FILLED_SHARE))
    share = layout.engine_share or min(DEDICATED_SHARE, max(0.0, room / gpu.memory_bytes))
    cache = int(share * gpu.memory_bytes) - sum(fixed.values())
    kv_tokens = max(0, cache * layout.tensor_parallel_size // model.kv_bytes_per_token())
    engine = {**fixed, "KV cache": max(0, cache)}
    devices = _devices(layout, trainer, beside, engine, limit)
    problem = _problem(devices, kv_tokens, work)
    return Estimate(
        layout=layout,
        setup=setup,
        devices=devices,
        kv_tokens=kv_tokens,
        engine_share=share,
        time=None if problem else _time(model, gpu, setup, layout, work, kv_tokens),
        problem=problem,
    )


def with_best_budget(
    model: Architecture, gpu: GpuKind, setup: TrainerSetup, layout: Layout, work: Workload, *, budget: int | None = None
) -> Estimate:
    """Estimate a layout with the token budget and the blocks computed again that the trainer would choose.

    Passes that are long enough come first, then as many blocks as fit keep their activations, and only then passes
    grow. None of this fills more than `FILLED_SHARE`; where nothing leaves so much room, passes are as long as fit. A
    micro-batch holds whole sequences: a budget below the longest is no use, nor one above a rank's share of a step.
    Where none fits, the smallest.

    Args:
        model: The policy.
        gpu: Kind of all GPUs.
        setup: How it is trained; its number of recomputed blocks, unless that is None, is left as it is.
        layout: Who gets which GPUs.
        work: The step.
        budget: The only one to try; None for all.
    """
    share = max(work.longest, -(-int(work.num_tokens) // layout.num_trainers))
    enough = max(work.longest, min(share, ENOUGH_TOKENS))
    budgets = [other for other in _BUDGETS if work.longest < other < share]
    candidates = [*([share] if share <= _BUDGETS[0] else []), *budgets, work.longest]
    found = [
        _with_fewest_recomputed(model, gpu, replace(setup, micro_batch_tokens=tokens), layout, work)
        for tokens in (candidates if budget is None else [budget])
    ]
    roomy = [other for other in found if _leaves_room(other)]
    long_enough = [other for other in roomy if other.setup.micro_batch_tokens >= enough]
    if long_enough:
        return min(
            long_enough, key=lambda other: other.setup.num_recomputed(model)
        )  # of several the longest, as listed
    if roomy:
        return roomy[0]
    tight = [other for other in found if not other.problem and other.setup.micro_batch_tokens <= enough]
    return tight[0] if tight else found[-1]


def _with_fewest_recomputed(
    model: Architecture, gpu: GpuKind, setup: TrainerSetup, layout: Layout, work: Workload
) -> Estimate:
    """Estimate a layout with as few blocks computed again as leave room; all of them where no number does."""

    def with_count(count: int) -> Estimate:
        return estimate(model, gpu, replace(setup, recomputed=count), layout, work)

    if not setup.checkpoints or setup.recomputed is not None:
        return estimate(model, gpu, setup, layout, work)
    # More of them never take more memory.
    count = bisect_left(range(model.num_layers), True, key=lambda count: _leaves_room(with_count(count)))
    return with_count(count)


def _leaves_room(found: Estimate) -> bool:
    """Whether what trains fits even if it takes somewhat more than estimated."""
    trainer = found.devices[0]
    return not found.problem and sum(trainer.parts.values()) <= FILLED_SHARE * trainer.limit


def _can_compile(model: Architecture, setup: TrainerSetup) -> bool:
    """Whether the trainer, left to choose, compiles such blocks on a GPU (trainer/blocks.py)."""
    return not model.num_moe_layers and setup.sharding != "zero3"


def _trainer_parts(model: Architecture, setup: TrainerSetup) -> dict[str, int]:
    memory = estimate_trainer_memory(model, setup)
    merged = 0
    if setup.method == "lora":
        # The largest matrix in float32 and its delta (523 MiB were measured at 8B).
        merged = 2 * 4 * max(linear.num_parameters for linear in (*model.attention, *(model.expert or model.dense_mlp)))
    return {
        "weights": memory.weights,
        "weight copies": memory.copies,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "logprobs": memory.logprobs,
        "publish": _TRAINER_PUBLISH_BYTES + merged,
        "runtime": TRAINER_RUNTIME_BYTES,
    }


def _beside_engine(
    model: Architecture, setup: TrainerSetup, layout: Layout, trainer: Mapping[str, int]
) -> dict[str, int]:
    """Return what a trainer keeps on the device while an engine of that device works."""
    if not layout.is_colocated:
        return {}
    if not layout.sleeps:
        return dict(trainer)
    optimizer = 0 if layout.offloads_optimizer else trainer["optimizer"]
    return {"weights": trainer["weights"], "optimizer": optimizer} | {
        name: trainer[name] for name in ("publish", "runtime")
    }


def _enough_cache(model: Architecture, layout: Layout, work: Workload) -> int:
    """Return the bytes of KV cache on a GPU of an engine with which no completion of a step waits for another."""
    at_once = min(MAX_NUM_SEQS, -(-work.num_samples // layout.num_engines))
    return at_once * work.longest * model.kv_bytes_per_token() // layout.tensor_parallel_size


def _devices(
    layout: Layout, trainer: Mapping[str, int], beside: Mapping[str, int], engine: Mapping[str, int], limit: int
) -> tuple[DeviceEstimate, ...]:
    if not layout.is_colocated:
        return (
            DeviceEstimate(role="trainer", count=layout.num_trainers, parts=trainer, resting=None, limit=limit),
            DeviceEstimate(role="engine", count=layout.num_workers, parts=engine, resting=None, limit=limit),
        )
    if layout.sleeps:
        parts = {**trainer, "engine asleep": SLEEPING_ENGINE_BYTES}
        resting: dict[str, int] | None = {**beside, **engine}
    else:
        parts, resting = {**trainer, **engine}, None
    return (DeviceEstimate(role="shared", count=layout.num_trainers, parts=parts, resting=resting, limit=limit),)


def _problem(devices: tuple[DeviceEstimate, ...], kv_tokens: int, work: Workload) -> str:
    for device in devices:
        if device.total > device.limit:
            fuller = max((device.parts, device.resting or {}), key=lambda parts: sum(parts.values()))
            largest = sorted(fuller.items(), key=lambda part: -part[1])[:3]
            said = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in largest)
            return (
                f"a {device.role} GPU needs {device.total / _GIB:.1f} GiB of the {device.limit / _GIB:.1f} that it can "
                f"use ({said}, ...)"
            )
    if kv_tokens < work.longest:
        return f"an engine's KV cache holds {kv_tokens} tokens, fewer than one sequence of {work.longest}"
    return ""


def _time(
    model: Architecture, gpu: GpuKind, setup: TrainerSetup, layout: Layout, work: Workload, kv_tokens: int
) -> StepTime:
    train, flops = training_seconds(model, gpu, setup, work)
    return StepTime(
        generate=generation_seconds(
            model,
            gpu,
            work,
            num_engines=layout.num_engines,
            tensor_parallel_size=layout.tensor_parallel_size,
            kv_tokens=kv_tokens,
        ),
        train=train,
        publish=publish_seconds(
            model,
            gpu,
            num_ranks=layout.num_trainers,
            num_engines=layout.num_engines,
            num_workers=layout.num_workers,
            is_colocated=layout.is_colocated,
        ),
        flops=flops,
    )
