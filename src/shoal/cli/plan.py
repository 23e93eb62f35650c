"""`shoal plan`: print who would get which device, on this machine or on one that is not at hand.

With a model and a known kind of GPU, also what would be in each device's memory, how long a step would take, and which
layouts would be faster. Imports neither torch nor vLLM, and opens no GPU.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from shoal.cli.plan_sizes import add_size_arguments, estimate_for, format_estimate, parse_gpus
from shoal.errors import PlacementError
from shoal.placement.devices import Device, discover_devices, hypothetical_gpus, usable_cpu_cores
from shoal.placement.model_shape import ModelShape, read_model_config, shape_from_config
from shoal.placement.parse import parse_devices
from shoal.placement.plan import place
from shoal.placement.records import EnginePlacement, PlacementPlan, PlacementRequest
from shoal.placement.wording import labels

_GIB = 1024**3
_UNKNOWN_MODEL = ModelShape(num_attention_heads=None, num_key_value_heads=None, num_hidden_layers=None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `shoal plan`."""
    machine = parser.add_mutually_exclusive_group()
    machine.add_argument("--gpus", metavar="N[xKIND]", help="plan for N GPUs, such as 8 or 8xH100 (0: CPUs only)")
    machine.add_argument("--devices", metavar="SPEC", help='plan for a machine with these GPUs, such as "0-3,6"')
    parser.add_argument("--cores", type=int, metavar="N", help="plan for N CPU cores (default: this machine's)")
    parser.add_argument("--trainer-processes", type=int, metavar="N", help="trainer processes (default: 1)")
    parser.add_argument("--model", type=Path, metavar="PATH", help="checkpoint's folder, or its config.json")
    parser.add_argument("--vllm-devices", default="auto", metavar="SPEC", help="vllm_devices (default: auto)")
    parser.add_argument("--tp", type=int, metavar="N", help="vllm_tensor_parallel_size (default: 1)")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="vllm_pipeline_parallel_size (default: 1)")
    parser.add_argument("--num-engines", type=int, metavar="N", help="vllm_num_engines (default: as many as fit)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_size_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        PlacementError: The devices cannot be divided as asked, or do not hold what they would have to.
    """
    config = None if args.model is None else read_model_config(args.model)
    shape = _UNKNOWN_MODEL if config is None else shape_from_config(config)
    num_gpus, kind = parse_gpus(args.gpus)
    devices = _devices(num_gpus, args.devices)
    sizes = estimate_for(args, config, devices, kind)
    layout = sizes.chosen.layout if sizes.chosen else None
    request = PlacementRequest(
        num_trainer_processes=args.trainer_processes or (layout.num_trainers if layout else 1),
        vllm_devices="colocate" if layout and layout.is_colocated else args.vllm_devices,
        tensor_parallel_size=args.tp or (layout.tensor_parallel_size if layout else 1),
        pipeline_parallel_size=args.pp,
        num_engines=args.num_engines,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        num_hidden_layers=shape.num_hidden_layers,
        cpu_cores=_cores(args.cores),
    )
    plan = place(devices, request)
    found = sizes.of_plan(plan)
    if args.json:
        print(json.dumps(asdict(plan) | ({"estimate": sizes.to_dict(found)} if found else {}), indent=2))
        return 0
    print(format_plan(plan))
    print(format_estimate(sizes, found), end="")
    return 0


def format_plan(plan: PlacementPlan) -> str:
    """Write a plan as a small table, its warnings below."""
    rows = [
        *((f"trainer-{rank}", _trainer_text(device)) for rank, device in enumerate(plan.trainers)),
        *((engine.name, _engine_text(engine)) for engine in plan.engines),
        *((("idle", labels(plan.idle)),) if plan.idle else ()),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in plan.warnings)])


def _devices(num_gpus: int | None, spec: str | None) -> tuple[Device, ...]:
    if spec is not None:
        parsed = parse_devices(spec, setting="--devices")
        if parsed.kind in ("auto", "colocate"):
            raise PlacementError(
                f'--devices="{spec}" describes no machine. List its GPUs, such as "0-3", or use --gpus.'
            )
        return hypothetical_gpus(parsed.indices)
    if num_gpus is None:
        return discover_devices()
    if not 0 <= num_gpus <= 1024:
        raise PlacementError(f"--gpus={num_gpus} is no number of GPUs of one host. Give 0 to 1024.")
    return hypothetical_gpus(range(num_gpus))


def _cores(number: int | None) -> tuple[int, ...]:
    if number is None:
        return usable_cpu_cores()
    if number < 1:
        raise PlacementError(f"--cores={number} leaves nothing to run on. Give at least 1.")
    return tuple(range(number))


def _trainer_text(device: Device) -> str:
    if device.memory_bytes is None:
        return device.label
    return f"{device.label} ({device.name}, {device.memory_bytes / _GIB:.0f} GiB)"


def _engine_text(engine: EnginePlacement) -> str:
    where = labels(engine.devices)
    if engine.cpu_cores:
        plural = "s" if len(engine.cpu_cores) > 1 else ""
        where = f"cpu, core{plural} {', '.join(str(core) for core in engine.cpu_cores)}"
    sizes = (("TP", engine.tensor_parallel_size), ("PP", engine.pipeline_parallel_size))
    split = [f"{name} {size}" for name, size in sizes if size > 1]
    return "; ".join([where, *split, *(["shared with the trainer"] if engine.colocated else [])])
