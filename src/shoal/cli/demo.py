"""`shoal demo`: train a small model on a task it is bad at, with as many engines as the machine allows."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

DEFAULT_STEPS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `shoal demo`."""
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, metavar="N", help=f"default: {DEFAULT_STEPS}")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--held-out", type=int, default=None, metavar="N", help="questions of the judging")
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint (default: SmolLM2-135M-Instruct)")


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    # Everything is local: no hub is asked for anything.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from shoal.demo.run import DemoSettings, run_demo
    from shoal.demo.task import NUM_HELD_OUT

    run_demo(
        DemoSettings(
            output_dir=args.output_dir,
            steps=args.steps,
            seed=args.seed,
            num_held_out=args.held_out or NUM_HELD_OUT,
            model=args.model,
        )
    )
    return 0
