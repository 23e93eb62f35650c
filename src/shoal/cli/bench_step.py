"""`shoal bench step`: the arguments, and what they come to."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.bench.shapes import SHAPES, shape_name
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.bench.step_run import StepRun

_LENGTHS = {"fixed": (False,), "ragged": (True,), "both": (False, True)}  # whether each part's are ragged
_TOKENS, _RAGGED_TOKENS = 510, 1024


def add_shape_argument(parser: argparse._ActionsContainer) -> None:
    """Declare `--model-shape`, which all benchmarks with engines have."""
    parser.add_argument(
        "--model-shape",
        type=shape_name,
        choices=tuple(SHAPES),
        default="tiny",
        metavar="SHAPE",
        help="tiny (default), or of Qwen3: 0.6b, 1.4b (1.7b with a small vocabulary), 1.7b, 8b; weights are random",
    )


def add_step_arguments(step: argparse.ArgumentParser) -> None:
    """Declare the arguments of `shoal bench step`."""
    step.add_argument("--device", choices=("cpu", "cuda"), required=True)
    add_shape_argument(step)
    step.add_argument("--layout", choices=("dedicated", "colocated"), default="dedicated", help="default: dedicated")
    step.add_argument("--ranks", type=int, default=1, metavar="N", help="trainer processes (default: 1)")
    step.add_argument("--num-engines", type=int, default=1, metavar="N", help="default: 1")
    step.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel size (default: 1)")
    step.add_argument("--sharding", choices=("ddp", "fsdp2"), default="ddp", help="of several ranks (default: ddp)")
    step.add_argument("--prompts", type=int, default=32, metavar="N", help="of one step (default: 32)")
    step.add_argument("--samples", type=int, default=8, metavar="N", help="of each prompt (default: 8)")
    step.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="default: 64")
    step.add_argument(
        "--lengths",
        choices=tuple(_LENGTHS),
        default="fixed",
        help="of completions: all alike (default), uniform from 16 tokens, or one after the other in the same run",
    )
    step.add_argument("--tokens", type=int, metavar="N", help="of every completion of fixed lengths (default: 510)")
    step.add_argument("--ragged-tokens", type=int, metavar="N", help="of the longest of ragged ones (default: 1024)")
    step.add_argument("--steps", type=int, default=5, metavar="N", help="behind a median (default: 5)")
    step.add_argument("--warmup-steps", type=int, default=2, metavar="N", help="before them (default: 2)")
    step.add_argument("--no-gradient-checkpointing", action="store_true", help="in both trainers")
    step.add_argument("--max-tokens-per-micro-batch", type=int, metavar="N", help="Shoal's (default: its own)")
    step.add_argument("--trl-micro-batch", type=int, default=8, metavar="N", help="completions a forward (default: 8)")
    step.add_argument("--sleep", action="store_true", help="colocated engines sleep in training, in both trainers")
    step.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE", help="default: each trainer's own")
    step.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    step.add_argument("--skip-trl", action="store_true", help="leave TRL out")
    step.add_argument("--timeout-s", type=float, default=3600, help="for each trainer (default: 3600)")
    step.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: below benchmarks/results/; with --lengths both, FILE-fixed and FILE-ragged",
    )


def run_step(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 if Shoal did not give all its figures.

    Raises:
        ConfigError: The layout does not fit the machine, or an option is about lengths that are not measured.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from shoal.bench.step import run_step_bench
    from shoal.bench.step_settings import check_step
    from shoal.placement.devices import discover_devices

    run = step_run(args)
    devices = discover_devices() if args.device == "cuda" else ()
    for part in run.parts:
        check_step(part, len(devices))
    done = run_step_bench(run, devices, output=args.output, skip_trl=args.skip_trl, timeout_s=args.timeout_s)
    return 0 if done else 1


def step_run(args: argparse.Namespace) -> StepRun:
    """Return what the arguments come to.

    Raises:
        ConfigError: One of them is about lengths that are not measured.
    """
    from shoal.bench.step_run import StepRun
    from shoal.bench.step_settings import StepSettings

    kinds = _LENGTHS[args.lengths]
    for option, given, is_ragged in (("--tokens", args.tokens, False), ("--ragged-tokens", args.ragged_tokens, True)):
        if given is not None and is_ragged not in kinds:
            raise ConfigError(
                f"{option} {given} says nothing about --lengths {args.lengths}. Leave it out, or give --lengths both."
            )
    fixed = StepSettings(
        model_shape=args.model_shape,
        device=args.device,
        layout=args.layout,
        num_ranks=args.ranks,
        num_engines=args.num_engines,
        tensor_parallel_size=args.tp,
        num_prompts=args.prompts,
        num_generations=args.samples,
        prompt_tokens=args.prompt_tokens,
        completion_tokens=_TOKENS if args.tokens is None else args.tokens,
        steps=args.steps,
        warmup_steps=args.warmup_steps,
        sharding=args.sharding,
        checkpoints=not args.no_gradient_checkpointing,
        max_tokens_per_micro_batch=args.max_tokens_per_micro_batch,
        trl_micro_batch=args.trl_micro_batch,
        sleeps=args.sleep,
        gpu_memory_utilization=args.gpu_memory_utilization,
        seed=args.seed,
    )
    longest = _RAGGED_TOKENS if args.ragged_tokens is None else args.ragged_tokens
    ragged = replace(fixed, is_ragged=True, completion_tokens=longest)
    return StepRun(parts=tuple(ragged if is_ragged else fixed for is_ragged in kinds))
