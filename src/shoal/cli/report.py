"""`shoal report`: make `report.html` again from what a run left behind."""

from __future__ import annotations

import argparse
from pathlib import Path

from shoal.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `shoal report`."""
    parser.add_argument("run_dir", type=Path, help="the run's output_dir, with its metrics.jsonl")


def run(args: argparse.Namespace) -> int:
    """Write the report and print where it is.

    Raises:
        ConfigError: The folder holds no run.
    """
    if not (args.run_dir / "metrics.jsonl").exists():
        raise ConfigError(f"{args.run_dir} has no metrics.jsonl, so there is no run to report on. Name its output_dir.")
    from shoal.observe.report import write_report

    print(write_report(args.run_dir))
    return 0
