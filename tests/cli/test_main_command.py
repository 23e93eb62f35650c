"""The `shoal` command itself: its subcommands, its help, its exit codes."""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace

import pytest

from shoal import __version__
from shoal.cli.main import SUBCOMMANDS, Subcommand, main
from shoal.errors import ConfigError, EngineError


def test_help_lists_every_subcommand_without_loading_any(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["--help"])
    assert exit_code.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed and subcommand.help in printed for name, subcommand in SUBCOMMANDS.items())


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"shoal {__version__}\n"


@pytest.mark.parametrize("words", [[], ["swim"]])
def test_a_command_line_without_a_known_subcommand_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(words)
    assert exit_code.value.code == 2


@pytest.mark.parametrize(("error", "code"), [(ConfigError("bad\nvalue"), 2), (EngineError("gone"), 1)])
def test_shoal_s_errors_become_a_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    module = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "shoal_test_subcommand", module)
    monkeypatch.setitem(SUBCOMMANDS, "fail", Subcommand(help="fail", module="shoal_test_subcommand"))
    assert main(["fail"]) == code
    assert capsys.readouterr().err == f"shoal fail: {' '.join(str(error).splitlines())}\n"
