"""The trainer's end of the processes that run functions: start one, call it under a time-out, kill it."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from shoal.errors import RewardError
from shoal.rewards.worker_process import Call, Reply, Setup

_PROGRAM = Path(__file__).with_name("worker_process.py")
_START_TIMEOUT_S = 120.0  # importing torch takes many seconds on a busy machine
_END_TIMEOUT_S = 10.0
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
# By these a library would take the worker for a trainer rank, and wait for the others.
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR")
_LAUNCHERS_PREFIXES = ("MASTER_PORT", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")


class WorkerEndedError(RewardError):
    """A worker process ended while it was starting or called."""


class Worker:
    """One running process; made by `WorkerLauncher.launch`. One call at a time."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self._process = process
        self._connection = connection

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process was seen to have ended."""
        return self._process.returncode is not None

    def is_running(self) -> bool:
        """Look whether the process lives; one that has ended is cleaned up."""
        if self._process.returncode is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.kill()
        return not self.has_ended

    def call(self, call: Call, *, timeout_s: float) -> Reply:
        """Have a function called and wait for what comes of it. The process is killed if that takes too long.

        Raises:
            TimeoutError: It took longer than `timeout_s`.
            WorkerEndedError: The process ended instead of answering.
        """
        return self.exchange(pickle.dumps(call, protocol=pickle.HIGHEST_PROTOCOL), timeout_s=timeout_s)

    def exchange(self, message: bytes, *, timeout_s: float) -> Reply:
        """Send a message and wait for the answer; see `call`."""
        try:
            self._connection.send_bytes(message)  # bounded by the socket's own time-out
            if not self._connection.poll(timeout_s):
                raise TimeoutError
            reply: Reply = pickle.loads(self._connection.recv_bytes())
        except (BlockingIOError, TimeoutError):
            self.kill()
            raise TimeoutError from None
        except (EOFError, OSError):
            raise WorkerEndedError(f"its process (pid {self.pid}) {self._how_it_ended()}") from None
        return reply

    def kill(self) -> None:
        """End the process and what it started, whatever it is doing. May be called from any thread, and again."""
        if self._process.returncode is None:  # not waited for yet, so its number is still its own
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait(timeout=_END_TIMEOUT_S)

    def _how_it_ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):  # it closed its connection and lives on
            self._process.wait(timeout=1.0)
        status = self._process.returncode
        if status is None:
            self.kill()
            return "closed its connection"
        if status < 0:
            hint = ", as when memory runs out" if status == -signal.SIGKILL else ""
            return f"was ended by {signal.Signals(-status).name}{hint}"
        return f"ended with code {status}"


class WorkerLauncher:
    """Starts processes that hold the same functions, and ends those that are left when it goes.

    The kernel kills a process when the *thread* that started it is gone. So one thread, which lives as long as this
    object, starts them all.

    Args:
        setup: Where the functions come from.
        is_quiet: Whether what they print is thrown away, rather than printed among the trainer's own output.
    """

    def __init__(self, setup: Setup, *, is_quiet: bool = False) -> None:
        self._setup = pickle.dumps(setup)
        self._output = subprocess.DEVNULL if is_quiet else None
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shoal-workers")
        self._workers: set[Worker] = set()
        weakref.finalize(self, _kill_all, self._workers)

    def launch(self, *, timeout_s: float = _START_TIMEOUT_S) -> Worker:
        """Start a process and wait until it holds the functions.

        Raises:
            RewardError: It could not get them, ended, or took longer than `timeout_s`.
        """
        worker = self._starter.submit(self._start, timeout_s).result(timeout=timeout_s)
        self._workers -= {other for other in list(self._workers) if other.has_ended}
        self._workers.add(worker)
        try:
            reply = worker.exchange(self._setup, timeout_s=timeout_s)
        except TimeoutError:
            raise RewardError(
                f"A worker process for reward functions was not ready after {timeout_s:g} s, most likely because "
                "importing them takes so long. Move what is slow from their modules into the functions."
            ) from None
        except BaseException:
            worker.kill()
            raise
        if reply["failure"] is not None:
            worker.kill()
            failure = reply["failure"]
            error = RewardError(f"{failure['kind']}: {failure['text']}")
            error.add_note(failure["trace"])
            raise error
        return worker

    def close(self) -> None:
        """Kill all processes. Others can be launched afterwards."""
        _kill_all(self._workers)

    def _start(self, timeout_s: float) -> Worker:
        """Start a process; on the one thread that they all depend on."""
        ours, theirs = socket.socketpair()
        for bound in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # for one piece of a message, once it is on its way
            ours.setsockopt(socket.SOL_SOCKET, bound, struct.pack("ll", int(timeout_s) + 1, 0))
        with theirs:
            process = subprocess.Popen(
                # -P keeps this folder off the import path, where its module names could hide others.
                [sys.executable, "-P", str(_PROGRAM), str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                env=_variables(),
                start_new_session=True,  # Ctrl-C is the trainer's; and the worker's own children can be killed with it
            )
        return Worker(process, Connection(ours.detach()))


def _variables() -> dict[str, str]:
    """Return the environment of a worker: no trainer rank, and one thread, since it shares the host with the others."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHERS and not name.startswith(_LAUNCHERS_PREFIXES)
    }
    return {**kept, **_ONE_THREAD, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def _kill_all(workers: set[Worker]) -> None:
    for worker in list(workers):
        worker.kill()
    workers.clear()
