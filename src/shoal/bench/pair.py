"""A script that measures what goes on between two processes, of which it starts the second by itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

from shoal.engines.command import LOOPBACK
from shoal.wire.rendezvous import Store, host_store, join_store

_T = TypeVar("_T")


def run_as_pair(member: Callable[[Store, int], _T], *, port: int, timeout_s: float) -> _T | None:
    """Be the trainer and start the worker: this script once more, with `--port` after its arguments. Or be that worker.

    Args:
        member: Is one end; gets the store where both meet, and its rank, 0 for the trainer.
        port: The script's `--port`, 0 by default.
        timeout_s: For meeting, and for the worker's end after the trainer's.

    Returns:
        What the trainer's end returned; None in the worker.
    """
    if port:
        member(join_store(LOOPBACK, port, timeout_s), 1)
        return None
    store = host_store(LOOPBACK, timeout_s)
    worker = subprocess.Popen([sys.executable, *sys.argv, "--port", str(store.port)])
    try:
        found = member(store, 0)
        worker.wait(timeout=timeout_s)
    finally:
        worker.kill()
        worker.wait()
    return found
