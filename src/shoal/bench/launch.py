"""Commands in process groups of their own, which are ended as a whole: launchers leave their ranks behind."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shoal.bench.children import StageError
from shoal.bench.process_group import end_group
from shoal.engines.process import reason_in, tail

_POLL_S = 0.1


def with_ranks(module: str, arguments: Sequence[str], num_ranks: int) -> list[str]:
    """Return the command that runs a module in as many processes of one group, through torchrun where they are many."""
    if num_ranks == 1:
        return [sys.executable, "-m", module, *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, *launcher, "-m", module, *arguments]


def run_to_end(
    command: Sequence[str],
    log: Path,
    *,
    timeout_s: float,
    environment: Mapping[str, str],
    on_end: Callable[[], None] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Run a command to its end, its words in `log`; nothing that it started is left.

    Args:
        command: What to run.
        log: What it prints.
        timeout_s: How long it may take.
        environment: Its own.
        on_end: Called when it has ended by itself, before what it may have left is ended.
        meanwhile: Called several times a second; what it raises ends the command.

    Raises:
        StageError: It failed, or took too long.
    """
    with log.open("wb") as file:
        child = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(child, log, timeout_s, meanwhile)
            if on_end is not None:
                on_end()
        finally:
            end_group(child)
    if child.returncode != 0:
        raise StageError(f"its process ended with status {child.returncode}: {reason_in(tail(log, 400))}")


def _wait(child: subprocess.Popen[bytes], log: Path, timeout_s: float, meanwhile: Callable[[], None] | None) -> None:
    deadline = time.monotonic() + timeout_s
    while child.poll() is None:
        if meanwhile is not None:
            meanwhile()
        if time.monotonic() > deadline:
            said = next((line for line in reversed(tail(log, 20)) if line.strip()), "nothing")
            raise StageError(f"it took more than {timeout_s:g} s; last words: {said.strip()[:300]}")
        time.sleep(_POLL_S)
