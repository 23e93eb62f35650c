"""Run one command and make sure that nothing of it outlives the process that asked for it.

    python -m shoal.engines.guard --parent PID [--cores 0,1] [--grace-s 10] -- COMMAND ...

The guard is the command's parent. It ends the command, and everything that the command started, when it is told to
(SIGTERM), when the command's first process ends, and when process PID is gone, however that came about: `kill -9` of
the trainer leaves it no time to clean up, so somebody else must. As a child subreaper the guard inherits every process
whose own parent dies, so none can slip away. Shared memory that they leave behind is removed. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

import psutil

from shoal.engines.shared_memory import SharedMemory

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.2
GRACE_S = 10.0
"""How long the command may take to end by itself after SIGTERM."""


class _Told:
    """Whether the guard was told to end; set by a signal handler."""

    def __init__(self) -> None:
        self.to_end = False

    def handle(self, _signal: int, _frame: FrameType | None) -> None:
        self.to_end = True


def main() -> int:
    """Run the command; return its exit status, or 143 when it was ended."""
    arguments = _parse_arguments()
    told = _Told()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, told.handle)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
    if arguments.cores:
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    command = subprocess.Popen(arguments.command, start_new_session=True)
    memory = SharedMemory()
    status: int | None = None
    while status is None and not told.to_end and os.getppid() == arguments.parent:
        try:
            status = command.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            memory.look(lambda: [process.pid for process in psutil.Process().children(recursive=True)])
    _end_descendants(arguments.grace_s if status is None else 0.0)
    memory.remove()
    return 143 if status is None else status


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a command that must not outlive its parent.")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--cores", default="")
    parser.add_argument("--grace-s", type=float, default=GRACE_S)
    parser.add_argument("command", nargs="+")
    return parser.parse_args()


def _end_descendants(grace_s: float) -> None:
    """Ask every descendant to end, then make it."""
    for process in _descendants():
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while _descendants() and time.monotonic() < deadline:
        time.sleep(_POLL_S / 4)
    # A process may fork while it is being ended: repeat until none is left.
    while remaining := _descendants():
        for process in remaining:
            _signal(process, signal.SIGKILL)
        time.sleep(_POLL_S / 4)


def _descendants() -> list[psutil.Process]:
    """Return the living descendants, reaping dead children on the way."""
    while True:
        try:
            reaped, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if reaped == 0:
            break
    try:
        return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return _descendants()


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


if __name__ == "__main__":
    sys.exit(main())
