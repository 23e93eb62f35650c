"""Commands in process groups of their own, which are ended as a whole: launchers leave their ranks behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from shoal.bench.children import StageError
from shoal.engines.process import reason_in, tail

_GRACE_S = 20.0
_POLL_S = 0.05


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
) -> None:
    """Run a command to its end, its words in `log`; nothing that it started is left.

    Args:
        command: What to run.
        log: What it prints.
        timeout_s: How long it may take.
        environment: Its own.
        on_end: Called when it has ended by itself, before what it may have left is ended.

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
            child.wait(timeout_s)
            if on_end is not None:
                on_end()
        except subprocess.TimeoutExpired:
            said = next((line for line in reversed(tail(log, 20)) if line.strip()), "nothing")
            raise StageError(f"it took more than {timeout_s:g} s; last words: {said.strip()[:300]}") from None
        finally:
            end_group(child)
    if child.returncode != 0:
        raise StageError(f"its process ended with status {child.returncode}: {reason_in(tail(log, 400))}")


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a process that leads its own group, and all below it, also those that have left the group."""
    members = _family(child.pid)
    _signal_group(child, signal.SIGTERM)
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    left = _wait_until_gone(child, members, _GRACE_S)
    _signal_group(child, signal.SIGKILL)
    for member in left:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    child.wait()
    _wait_until_gone(child, left, _GRACE_S)


def _wait_until_gone(
    child: subprocess.Popen[bytes], members: Sequence[psutil.Process], timeout_s: float
) -> list[psutil.Process]:
    """Wait until the processes have ended; return those that have not."""
    deadline = time.monotonic() + timeout_s
    while True:
        child.poll()
        living = [member for member in members if _lives(member)]
        if not living or time.monotonic() > deadline:
            return living
        time.sleep(_POLL_S)


def _lives(member: psutil.Process) -> bool:
    try:
        return bool(member.is_running() and member.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    # The leader's number stays its group's as long as a member lives, and is ours until `wait` has been called.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)
