"""Ending a process with all that it has started, also what has outlived it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

_GRACE_S = 20.0
_POLL_S = 0.05


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
