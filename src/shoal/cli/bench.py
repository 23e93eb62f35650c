"""`shoal bench`: measure on this machine what the documentation claims."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from shoal.cli.bench_step import add_shape_argument, add_step_arguments, run_step
from shoal.errors import ConfigError

_SOURCES = ("plain", "lora-merged", "adapter", "ddp", "fsdp2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `shoal bench`."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    weights = benchmarks.add_parser(
        "weights", help="time from the trainer's weights to every engine, beside the wire alone and vLLM's own update"
    )
    add_shape_argument(weights)
    weights.add_argument("--device", choices=("cpu", "cuda"), required=True)
    weights.add_argument("--engine-devices", type=_indices, default=(), metavar="LIST", help="GPUs, such as 1,2")
    weights.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel size (default: 1)")
    weights.add_argument("--num-engines", type=int, default=1, metavar="N", help="default: 1")
    weights.add_argument("--colocate", action="store_true", help="engines share the trainer's GPUs")
    weights.add_argument(
        "--backend",
        choices=("auto", "ipc", "nccl"),
        default="auto",
        help="to engines on their own GPUs: CUDA IPC where these reach the trainer's (auto), or NCCL",
    )
    weights.add_argument("--source", choices=_SOURCES, default="plain", help="ddp and fsdp2: with torchrun")
    weights.add_argument("--lora-rank", type=int, default=16, metavar="N", help="default: 16")
    weights.add_argument("--repeats", type=int, default=20, metavar="N", help="publishes behind a median (default: 20)")
    weights.add_argument("--running-requests", type=int, default=256, metavar="N", help="default: 256")
    weights.add_argument("--verify", choices=("digest", "full"), default="digest", help="default: digest")
    weights.add_argument("--skip-native", action="store_true", help="leave out vLLM's own update")
    weights.add_argument("--skip-raw", action="store_true", help="leave out the wire alone")
    weights.add_argument("--enforce-eager", action="store_true", help="engines without CUDA graphs: they start faster")
    weights.add_argument("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="default: 0.9")
    weights.add_argument("--output", type=Path, metavar="FILE", help="default: below benchmarks/results/")
    _add_rollouts_arguments(
        benchmarks.add_parser(
            "rollouts", help="tokens/s of engines beside vllm.LLM.generate; --simulate: how good dispatch is"
        )
    )
    add_step_arguments(benchmarks.add_parser("step", help="seconds of whole steps, by phase, beside TRL's"))


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 if a publish was not proven, or the flipped bit not found.

    Raises:
        ConfigError: The layout does not fit the machine, or leaves nothing to simulate.
    """
    if args.benchmark == "weights":
        return _run_weights(args)
    if args.benchmark == "step":
        return run_step(args)
    return _run_simulation(args) if args.simulate else _run_throughput(args)


def _add_rollouts_arguments(rollouts: argparse.ArgumentParser) -> None:
    rollouts.add_argument("--simulate", action="store_true", help="simulate the engines")
    rollouts.add_argument("--repeats", type=int, metavar="N", help="behind a median (default: 3; simulated: 5)")
    rollouts.add_argument(
        "--samples", type=int, metavar="N", help="an engine writes (default: 256); simulated: of a prompt (default: 8)"
    )
    rollouts.add_argument("--prompt-tokens", type=int, metavar="N", help="of each (default: 64; simulated: 512)")
    _add_throughput_arguments(rollouts.add_argument_group("with real engines"))
    _add_simulation_arguments(rollouts.add_argument_group("with --simulate"))


def _add_throughput_arguments(rollouts: argparse._ArgumentGroup) -> None:
    rollouts.add_argument("--device", choices=("cpu", "cuda"), help="of the engines; must be given")
    add_shape_argument(rollouts)
    rollouts.add_argument("--tokens", type=int, default=256, metavar="N", help="of each completion (default: 256)")
    rollouts.add_argument("--group", type=int, default=8, metavar="N", help="completions of a prompt (default: 8)")
    rollouts.add_argument("--enforce-eager", action="store_true", help="engines without CUDA graphs")
    rollouts.add_argument("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="default: 0.9")
    rollouts.add_argument("--output", type=Path, metavar="FILE", help="default: below benchmarks/results/")


def _add_simulation_arguments(rollouts: argparse._ArgumentGroup) -> None:
    rollouts.add_argument("--engines", type=int, default=64, metavar="N", help="default: 64")
    rollouts.add_argument("--prompts", type=int, default=256, metavar="N", help="of one step (default: 256)")
    rollouts.add_argument("--median", type=float, default=1000, metavar="N", help="tokens of a sample (default: 1000)")
    rollouts.add_argument("--p99", type=float, default=16000, metavar="N", help="the 99th percentile (default: 16000)")
    rollouts.add_argument("--longest", type=int, default=32768, metavar="N", help="where they are cut (default: 32768)")
    rollouts.add_argument(
        "--correlation", type=float, default=0.5, help="of the log lengths of one prompt's samples (default: 0.5)"
    )
    rollouts.add_argument("--deaths", type=int, default=0, metavar="N", help="engines that die (default: 0)")
    rollouts.add_argument("--stalls", type=int, default=0, metavar="N", help="engines that hang (default: 0)")
    rollouts.add_argument("--stall-s", type=float, default=120, help="until one is given up (default: 120)")
    rollouts.add_argument("--max-in-flight", type=int, default=256, metavar="N", help="the pool's (default: 256)")
    rollouts.add_argument("--affinity-margin", type=int, default=2, metavar="N", help="the pool's (default: 2)")
    rollouts.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    rollouts.add_argument("--step-ms", type=float, default=4.0, help="an empty decode step (default: 4)")
    rollouts.add_argument("--sequence-us", type=float, default=16.0, help="what a sequence adds (default: 16)")
    rollouts.add_argument("--context-us", type=float, default=0.049, help="what a context token adds (default: 0.049)")
    rollouts.add_argument("--prefill-us", type=float, default=8.5, help="a prompt token (default: 8.5)")
    rollouts.add_argument("--kv-tokens", type=int, default=560_000, metavar="N", help="KV cache (default: 560000)")
    rollouts.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="an engine's (default: 256)")


def _run_throughput(args: argparse.Namespace) -> int:
    if args.device is None:
        raise ConfigError("shoal bench rollouts starts engines. Say where (--device cpu or cuda), or add --simulate.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from shoal.bench.throughput import run_throughput
    from shoal.bench.throughput_settings import ThroughputSettings, check_throughput
    from shoal.placement.devices import discover_devices

    devices = tuple(discover_devices()) if args.device == "cuda" else ()
    settings = ThroughputSettings(
        model_shape=args.model_shape,
        device=args.device,
        num_samples=_given(args.samples, 256),
        num_generations=args.group,
        tokens=args.tokens,
        prompt_tokens=_given(args.prompt_tokens, 64),
        repeats=_given(args.repeats, 3),
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=args.enforce_eager,
    )
    check_throughput(settings, len(devices))
    run_throughput(settings, devices, args.output)
    return 0


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _run_simulation(args: argparse.Namespace) -> int:
    from shoal.bench.rollouts import SimulationSettings, check_simulation, run_simulation
    from shoal.bench.simulated_engine import EngineModel
    from shoal.rollout.dispatch import DispatchSettings

    settings = SimulationSettings(
        num_engines=args.engines,
        num_prompts=args.prompts,
        num_generations=_given(args.samples, 8),
        median_tokens=args.median,
        p99_tokens=args.p99,
        longest_tokens=args.longest,
        correlation=args.correlation,
        prompt_tokens=_given(args.prompt_tokens, 512),
        num_deaths=args.deaths,
        num_stalls=args.stalls,
        stall_s=args.stall_s,
        repeats=_given(args.repeats, 5),
        seed=args.seed,
        model=EngineModel(
            step_s=args.step_ms / 1e3,
            sequence_s=args.sequence_us / 1e6,
            context_s=args.context_us / 1e6,
            prefill_s=args.prefill_us / 1e6,
            kv_tokens=args.kv_tokens,
            max_num_seqs=args.max_num_seqs,
        ),
        dispatch=DispatchSettings(max_in_flight=args.max_in_flight, affinity_margin=args.affinity_margin),
    )
    check_simulation(settings)
    run_simulation(settings)
    return 0


def _run_weights(args: argparse.Namespace) -> int:
    for name in ("tp", "num_engines", "lora_rank", "repeats", "running_requests"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} measures nothing. Give at least 1.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from shoal.bench.settings import BenchSettings, check_source, settle_devices
    from shoal.bench.weights import Options, run_weights_bench
    from shoal.placement.devices import discover_devices

    devices = discover_devices() if args.device == "cuda" else ()
    settings = BenchSettings(
        model_shape=args.model_shape,
        device=args.device,
        engine_devices=args.engine_devices,
        tensor_parallel_size=args.tp,
        num_engines=args.num_engines,
        num_ranks=int(os.environ.get("WORLD_SIZE", "1")),
        source=args.source,
        lora_rank=args.lora_rank,
        repeats=args.repeats,
        running_requests=args.running_requests,
        verify=args.verify,
        backend_on_gpus=args.backend,
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=args.enforce_eager,
    )
    check_source(settings)
    settings = settle_devices(settings, devices, colocate=args.colocate)
    options = Options(output=args.output, skip_raw=args.skip_raw, skip_native=args.skip_native)
    return 0 if run_weights_bench(settings, options, devices) else 1


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(piece) for piece in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of GPUs such as 1,2") from None
