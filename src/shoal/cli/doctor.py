"""`shoal doctor`: look for what would make a run fail or slow, and say what to do about it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `shoal doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 if a run would fail."""
    from shoal.cli.doctor_checks import check_all, gather_facts, system

    findings = check_all(gather_facts())
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(system())
        for finding in findings:
            print(f"{finding.level:<8} {finding.text}" + (f". {finding.advice}" if finding.advice else ""))
    return int(any(finding.level == "broken" for finding in findings))
