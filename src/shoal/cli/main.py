"""The `shoal` command: finds the subcommand, and turns Shoal's errors into one paragraph and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from shoal import __version__
from shoal.errors import ConfigError, ShoalError

EXIT_FAILED = 1
EXIT_REFUSED = 2  # What argparse uses for a bad command line: a bad setting is the same to whoever calls us.


class SubcommandModule(Protocol):
    """What a module under `shoal.cli` provides."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the subcommand's arguments."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do the work and return the exit code."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Subcommand:
    """One entry of `SUBCOMMANDS`.

    Attributes:
        help: One line for `shoal --help`.
        module: The module to import once this subcommand is the one called, so that the others cost nothing.
    """

    help: str
    module: str


SUBCOMMANDS = {
    "bench": Subcommand(help="measure whole steps, publishes or rollouts", module="shoal.cli.bench"),
    "demo": Subcommand(help="train a small model in minutes, on this machine as it is", module="shoal.cli.demo"),
    "doctor": Subcommand(help="check this environment, and say what to do", module="shoal.cli.doctor"),
    "plan": Subcommand(help="show which devices would train and which would generate", module="shoal.cli.plan"),
    "report": Subcommand(help="make the HTML report of a run", module="shoal.cli.report"),
    "serve": Subcommand(help="start one engine that trainers elsewhere attach to", module="shoal.cli.serve"),
    "train": Subcommand(help="train what a YAML or JSON file describes", module="shoal.cli.train"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: The command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a setting or command line that was refused.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser, modules = _parser(called=words[0] if words else None)
    args = parser.parse_args(words)
    try:
        return modules[args.subcommand].run(args)
    except ShoalError as error:
        print(f"shoal {args.subcommand}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return EXIT_REFUSED if isinstance(error, ConfigError) else EXIT_FAILED


def _parser(called: str | None) -> tuple[argparse.ArgumentParser, dict[str, SubcommandModule]]:
    """Build the parser, with the arguments of the called subcommand only; nothing precedes a subcommand's name."""
    parser = argparse.ArgumentParser(
        prog="shoal", description="GRPO training while many vLLM engines write the completions."
    )
    parser.add_argument("--version", action="version", version=f"shoal {__version__}")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    modules: dict[str, SubcommandModule] = {}
    for name, subcommand in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=subcommand.help, description=subcommand.help.capitalize() + ".")
        if name == called:
            modules[name] = cast("SubcommandModule", import_module(subcommand.module))
            modules[name].add_arguments(subparser)
    return parser, modules
