"""The part of `shoal plan` that is about sizes: memory by device and part, seconds a step, proposals."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shoal.errors import PlacementError
from shoal.placement.architecture import Architecture, architecture_from_config
from shoal.placement.devices import Device
from shoal.placement.estimate import DeviceEstimate, Estimate, Layout, with_best_budget
from shoal.placement.gpu_kinds import GpuKind, find_gpu_kind, gpu_kind, known_gpu_kind
from shoal.placement.propose import check_fits, propose, settings_of
from shoal.placement.records import PlacementPlan
from shoal.placement.step_time import Workload
from shoal.placement.trainer_memory import Sharding, TrainerSetup

_GIB = 1 << 30
_GPUS = re.compile(r"(\d+)(?:x(.+))?")
_RATES = ("gpu_memory_gib", "gpu_tflops", "gpu_memory_gbps", "gpu_link_gbps")


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that sizes depend on."""
    step = parser.add_argument_group("what a step is about")
    step.add_argument("--prompts", type=int, default=32, metavar="N", help="of one step (default: 32)")
    step.add_argument("--num-generations", type=int, default=8, metavar="N", help="of each prompt (default: 8)")
    step.add_argument("--prompt-tokens", type=int, default=256, metavar="N", help="default: 256")
    step.add_argument("--completion-tokens", type=int, default=1024, metavar="N", help="longest (default: 1024)")
    step.add_argument("--mean-completion-tokens", type=float, metavar="N", help="default: half of the longest")
    training = parser.add_argument_group("how it is trained")
    training.add_argument("--method", choices=("full", "lora"), default="full", help="default: full")
    training.add_argument("--lora-rank", type=int, default=16, metavar="N", help="default: 16")
    training.add_argument("--lora-targets", metavar="LIST", help="such as q_proj,v_proj (default: all of every block)")
    training.add_argument(
        "--sharding", choices=("ddp", "fsdp2", "zero3"), help="default: ddp where it fits, else fsdp2"
    )
    training.add_argument("--no-gradient-checkpointing", action="store_true", help="keep all activations")
    training.add_argument(
        "--recompute-num-layers", type=int, metavar="N", help="blocks computed again (default: as few as fit)"
    )
    training.add_argument(
        "--no-regional-compilation", action="store_true", help="do not compile the blocks (default: of dense models)"
    )
    training.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: float32)"
    )
    training.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="default: bf16")
    training.add_argument("--max-tokens-per-micro-batch", type=int, metavar="N", help="default: the fastest that fits")
    training.add_argument("--sleep", action="store_true", help="colocated engines sleep in training")
    training.add_argument("--offload-optimizer", action="store_true", help="the optimizer is on the host in rollouts")
    training.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE", help="default: what is left")
    gpu = parser.add_argument_group("a kind of GPU that is not known")
    gpu.add_argument("--gpu-memory-gib", type=float, metavar="N")
    gpu.add_argument("--gpu-tflops", type=float, metavar="N", help="dense bfloat16")
    gpu.add_argument("--gpu-memory-gbps", type=float, metavar="N", help="GB/s of its own memory")
    gpu.add_argument("--gpu-link-gbps", type=float, metavar="N", help="GB/s to another GPU, one way")


def parse_gpus(text: str | None) -> tuple[int | None, str | None]:
    """Read `8` or `8xH100`: the number, and the name of the kind.

    Raises:
        PlacementError: It is neither.
    """
    if text is None:
        return None, None
    match = _GPUS.fullmatch(text)
    if match is None:
        raise PlacementError(f"--gpus={text} is no number of GPUs. Give one, such as 8, or 8xH100 to name their kind.")
    return int(match[1]), match[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is known for an estimate.

    Attributes:
        why_not: Why there is none; empty where there is one.
        model: The policy.
        gpu: Kind of all GPUs.
        setup: How it is trained.
        work: What a step is about.
        proposals: Layouts that fit, the fastest first.
        chosen: What to show where the user asks for no layout; None where the user does.
        options: What the user says about memory: `sleeps`, `offloads_optimizer`, `engine_share`.
        budget: `max_tokens_per_micro_batch`; None for the fastest that fits.
        shardings: Those that may be used.
    """

    why_not: str
    model: Architecture | None = None
    gpu: GpuKind | None = None
    setup: TrainerSetup = field(default_factory=TrainerSetup)
    work: Workload | None = None
    proposals: tuple[Estimate, ...] = ()
    chosen: Estimate | None = None
    options: Mapping[str, Any] | None = None
    budget: int | None = None
    shardings: tuple[Sharding, ...] = ()

    def of_plan(self, plan: PlacementPlan) -> Estimate | None:
        """Estimate what a plan comes to; None where that cannot be done.

        Raises:
            PlacementError: It does not fit.
        """
        if self.model is None or self.gpu is None or self.work is None:
            return None
        if self.chosen is not None:
            return self.chosen
        found = self._estimate(_layout_of(plan, self.options or {}))
        check_fits(found, self.model, self.gpu, self.work, self.proposals)
        return found

    def to_dict(self, found: Estimate) -> dict[str, Any]:
        """Return an estimate and the proposals, of plain JSON types."""
        assert self.model is not None and self.gpu is not None
        return {
            "model": {
                "parameters": self.model.num_parameters,
                "matmul_parameters": self.model.matmul_parameters,
                "kv_bytes_per_token": self.model.kv_bytes_per_token(),
            },
            "gpu": asdict(self.gpu),
            "chosen": _plain(found),
            "proposals": [_plain(other) | {"settings": settings_of(other)} for other in self.proposals],
        }

    def _estimate(self, layout: Layout) -> Estimate:
        assert self.model is not None and self.gpu is not None and self.work is not None
        found = None
        for sharding in self.shardings if layout.num_trainers > 1 else ("ddp",):
            setup = replace(self.setup, sharding=sharding)
            found = with_best_budget(self.model, self.gpu, setup, layout, self.work, budget=self.budget)
            if not found.problem:
                break
        assert found is not None, "there is a sharding to try"
        return found


def estimate_for(
    args: argparse.Namespace, config: Mapping[str, Any] | None, devices: Sequence[Device], kind: str | None
) -> Sizes:
    """Gather what an estimate needs.

    Raises:
        PlacementError: The kind of GPU is not known, or a number makes no sense.
    """
    gpu = _gpu(args, devices, kind)
    if config is None or not devices:
        return Sizes(why_not="")
    if gpu is None:
        return Sizes(why_not="the kind of GPU is not known: name it, such as --gpus 8xH100")
    try:
        model = architecture_from_config(config)
    except PlacementError as refusal:
        return Sizes(why_not=str(refusal))
    setup, work = _setup(args), _workload(args)
    shardings: tuple[Sharding, ...] = (args.sharding,) if args.sharding else ("ddp", "fsdp2")
    proposals = propose(model, gpu, len(devices), setup, work, shardings=shardings)
    is_free = args.trainer_processes is None and args.tp is None and args.num_engines is None and args.pp == 1
    is_free = is_free and args.vllm_devices == "auto" and args.max_tokens_per_micro_batch is None
    options = {
        "sleeps": args.sleep,
        "offloads_optimizer": args.offload_optimizer,
        "engine_share": args.gpu_memory_utilization,
    }
    return Sizes(
        why_not="",
        model=model,
        gpu=gpu,
        setup=setup,
        work=work,
        proposals=proposals,
        chosen=proposals[0] if is_free and proposals and not any(options.values()) else None,
        options=options,
        budget=args.max_tokens_per_micro_batch,
        shardings=shardings,
    )


def format_estimate(sizes: Sizes, found: Estimate | None) -> str:
    """Write memory by device and part, seconds by phase, and proposals; every line ends with a newline."""
    if found is None:
        return f"no estimate of memory and time: {sizes.why_not}\n" if sizes.why_not else ""
    assert sizes.model is not None and sizes.gpu is not None and sizes.work is not None and found.time is not None
    time, work = found.time, sizes.work
    share = time.flops / time.train / found.setup.num_ranks / sizes.gpu.flops
    lines = [
        "",
        f"{sizes.model.num_parameters / 1e9:.3f} B parameters, {sizes.model.kv_bytes_per_token() / 1024:.0f} KiB of KV "
        f"cache a token; {sizes.gpu.name} with {sizes.gpu.memory_bytes / _GIB:.1f} GiB. Estimated memory in GiB:",
        *(line for device in found.devices for line in _device_lines(device)),
        f"KV cache of an engine: {found.kv_tokens:,} tokens",
        _blocks_line(sizes.model, found.setup),
        f"set: {settings_of(found)}",
        f"seconds a step: generation {time.generate:.1f}, training {time.train:.1f} ({share:.0%} MFU assumed), publish "
        f"{time.publish:.2f}; {time.total:.1f} in all for {work.num_samples} completions",
        "layouts that fit, by estimated seconds a step:",
        *(
            f"  {other.time.total:8.1f}  {other.layout.name}: {settings_of(other)}"
            for other in sizes.proposals
            if other.time is not None
        ),
    ]
    return "\n".join(lines) + "\n"


def _blocks_line(model: Architecture, setup: TrainerSetup) -> str:
    """Say what the blocks' part of memory and seconds rests on."""
    compiled = "compiled one by one" if setup.compiled else "not compiled"
    again = setup.num_recomputed(model)
    return (
        f"blocks: {compiled}, {again} of {model.num_layers} computed again in the backward pass, in passes of at most "
        f"{setup.micro_batch_tokens:,} tokens"
    )


def _device_lines(device: DeviceEstimate) -> list[str]:
    several = f" (each of {device.count})" if device.count > 1 else ""
    phases = [("", device.parts)]
    if device.resting is not None:
        phases = [(", training", device.parts), (", generating", device.resting)]
    lines = []
    for phase, parts in phases:
        total = sum(parts.values()) / _GIB
        lines.append(f"  {device.role}{several}{phase}: {total:.1f} of {device.limit / _GIB:.1f} usable")
        lines += [f"    {name:<16}{size / _GIB:8.2f}" for name, size in parts.items() if size >= _GIB // 200]
    return lines


def _layout_of(plan: PlacementPlan, options: Mapping[str, Any]) -> Layout:
    engine = plan.engines[0]
    shared = any(other.colocated for other in plan.engines)
    return Layout(
        num_trainers=len(plan.trainers),
        num_engines=len(plan.engines),
        tensor_parallel_size=engine.tensor_parallel_size * engine.pipeline_parallel_size,
        is_colocated=shared,
        sleeps=bool(options.get("sleeps")) and shared,
        offloads_optimizer=bool(options.get("offloads_optimizer")) and shared,
        engine_share=options.get("engine_share"),
    )


def _gpu(args: argparse.Namespace, devices: Sequence[Device], kind: str | None) -> GpuKind | None:
    given = {name: getattr(args, name) for name in _RATES}
    if any(value is not None for value in given.values()):
        missing = [f"--{name.replace('_', '-')}" for name, value in given.items() if not value or value <= 0]
        if missing:
            raise PlacementError(
                f"a kind of GPU is described by four numbers above 0; {', '.join(missing)} is missing."
            )
        return gpu_kind(
            kind or "GPU",
            int(args.gpu_memory_gib * 1024),
            args.gpu_tflops,
            args.gpu_memory_gbps,
            args.gpu_link_gbps,
        )
    if kind is not None:
        return known_gpu_kind(kind)
    return find_gpu_kind(devices[0].name) if devices else None


def _setup(args: argparse.Namespace) -> TrainerSetup:
    count = args.recompute_num_layers
    if count is not None and (count < 0 or args.no_gradient_checkpointing):
        raise PlacementError(
            f"--recompute-num-layers={count} says how many blocks gradient checkpointing computes again. "
            "Give 0 or more, without --no-gradient-checkpointing."
        )
    targets = None if args.lora_targets is None else frozenset(args.lora_targets.split(","))
    return TrainerSetup(
        method=args.method,
        lora_rank=args.lora_rank,
        lora_targets=targets,
        precision=args.precision,
        dtype=args.dtype,
        checkpoints=not args.no_gradient_checkpointing,
        recomputed=count,
        compiled=not args.no_regional_compilation,
        micro_batch_tokens=args.max_tokens_per_micro_batch or TrainerSetup().micro_batch_tokens,
    )


def _workload(args: argparse.Namespace) -> Workload:
    for name in ("prompts", "num_generations", "prompt_tokens", "completion_tokens", "lora_rank"):
        if getattr(args, name) < 1:
            raise PlacementError(
                f"--{name.replace('_', '-')}={getattr(args, name)} leaves nothing to plan. Give 1 or more."
            )
    mean = args.mean_completion_tokens or args.completion_tokens / 2
    if not 0 < mean <= args.completion_tokens:
        raise PlacementError(
            f"--mean-completion-tokens={mean:g} is not between 0 and --completion-tokens={args.completion_tokens}."
        )
    return Workload(
        num_prompts=args.prompts,
        num_generations=args.num_generations,
        prompt_tokens=args.prompt_tokens,
        completion_tokens=args.completion_tokens,
        mean_completion_tokens=mean,
    )


def _plain(found: Estimate) -> dict[str, Any]:
    setup = asdict(found.setup)
    targets = setup["lora_targets"]
    return {
        "layout": asdict(found.layout),
        "setup": setup | {"lora_targets": None if targets is None else sorted(targets)},
        "devices": [
            {"role": device.role, "count": device.count, "limit_bytes": device.limit, "total_bytes": device.total,
             "bytes": dict(device.parts), "resting_bytes": None if device.resting is None else dict(device.resting)}
            for device in found.devices
        ],
        "kv_tokens": found.kv_tokens,
        "gpu_memory_utilization": round(found.engine_share, 3),
        "seconds": None if found.time is None else asdict(found.time) | {"total": found.time.total},
    }  # fmt: skip
