"""Measure every layout of this host in one run: publishes, rollouts, steps, beside TRL where it can run them.

    python -m benchmarks.many_gpus                    # all GPUs of this host: 2, 4, 8, or between
    python -m benchmarks.many_gpus --dry-run --gpus 8 # the commands, on any machine
    python -m benchmarks.many_gpus --device cpu       # one tiny layout, to try the script

Expected, written before the first run (`shoal.bench.layouts`): rollouts at least 0.95 of linear in engines; Qwen3-8B
from FSDP2 on 4 to TP 4 published in at most 60 ms; no layout's step slower than that of two GPUs. Each command has a
time-out; what fails leaves its figures empty, with the reason. Results go below benchmarks/results/.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from shoal.bench.layouts import TINY, MachineLayout, Work, commands_for, layouts_for
from shoal.bench.many_gpus import run_layouts
from shoal.errors import ShoalError
from shoal.placement.devices import discover_devices


def main() -> int:
    """Run the layouts; 1 if one gave no figures at all, or left a process behind."""
    args = _arguments()
    try:
        devices = discover_devices() if args.device == "cuda" and args.gpus is None else ()
        number = len(devices) if args.gpus is None else args.gpus
        if args.device == "cpu":
            layouts, work = (MachineLayout(num_ranks=1, num_engines=1, source="plain"),), TINY
        else:
            layouts, work = layouts_for(number), Work()
    except ShoalError as error:
        print(f"many_gpus: {error}", file=sys.stderr)
        return 2
    work = replace(work, timeout_s=args.timeout_s)
    layouts = tuple(layout for layout in layouts if not args.only or layout.name in args.only)
    date = datetime.now(UTC).date().isoformat()
    size = "cpu" if args.device == "cpu" else f"{number}-gpus"
    folder = args.output or Path("benchmarks/results") / f"{date}-{size}-layouts"
    if args.dry_run:
        for layout in layouts:
            print(f"# {layout.name}, {layout.num_gpus} GPUs")
            for command in commands_for(layout, work, folder).values():
                print(shlex.join(command))
        return 0
    results = run_layouts(layouts, work, folder, [device.name for device in devices] or ["CPU"])
    return int(any(not result.figures or result.left_behind for result in results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_gpus", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    parser.add_argument("--gpus", type=int, metavar="N", help="with --dry-run: of a machine that is not at hand")
    parser.add_argument("--only", nargs="+", metavar="LAYOUT", help="names of layouts, as --dry-run prints them")
    parser.add_argument("--timeout-s", type=int, default=900, help="for each command (default: 900)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: below benchmarks/results/")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    args = parser.parse_args()
    if args.gpus is not None and not args.dry_run:
        parser.error(
            "--gpus is for --dry-run: what is run uses the GPUs that are here (CUDA_VISIBLE_DEVICES limits them)"
        )
    return args


if __name__ == "__main__":
    sys.exit(main())
