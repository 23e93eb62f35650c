"""The process that runs users' functions beside the trainer: one call in, one answer out, until the trainer is gone.

It is a process because a call that never returns cannot be ended otherwise: a thread cannot be stopped, and one long C
call (`9 ** 9 ** 9 ** 9`) keeps every Python signal handler from running. The kernel ends it with the trainer, whatever
it is doing. Started by its path, not as a module, so that it imports nothing of Shoal unless a function does.

Both ends of the connection are ours, joined before the process starts and reachable by no name: what is pickled here
comes from the trainer, or from functions that the trainer chose to run.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypedDict

_PR_SET_PDEATHSIG = 1

Log = tuple[str, str, Any]
"""A call of `log_extra` or `log_metric`: which of the two, and its arguments."""


class Failure(TypedDict):
    """What is left of an exception once it leaves its process.

    Attributes:
        kind: Name of its type.
        text: What it says; at most five lines, unless it is ours.
        where: File and line that raised it; empty if unknown.
        trace: The whole traceback as text.
        is_ours: Whether it is a `RewardError`, whose text is complete as it is.
    """

    kind: str
    text: str
    where: str
    trace: str
    is_ours: bool


class Setup(TypedDict):
    """What a process is told first.

    Attributes:
        path: The trainer's `sys.path`.
        pickled: A pickled list of functions; empty when they are in a file.
        file: A file that defines them; empty when they are pickled.
        names: Their names in that file.
    """

    path: list[str]
    pickled: bytes
    file: str
    names: list[str]


class Call(TypedDict):
    """One call.

    Attributes:
        function: Index among the functions.
        arguments: Positional ones.
        keywords: Pickled keyword arguments.
        logs: Whether the function is handed `log_extra` and `log_metric`.
    """

    function: int
    arguments: tuple[Any, ...]
    keywords: bytes
    logs: bool


class Reply(TypedDict):
    """What came of a call, or of starting.

    Attributes:
        value: What was returned.
        failure: What was raised instead; None if nothing was.
        logs: What was logged, in order.
    """

    value: Any
    failure: Failure | None
    logs: list[Log]


def main(descriptor: int, parent: int) -> None:
    """Answer calls that come over an inherited connection.

    Args:
        descriptor: Its file descriptor.
        parent: Process id of the trainer.
    """
    _end_with(parent)
    _leave_nothing_behind(descriptor)
    connection = Connection(descriptor)
    try:
        functions = _functions(pickle.loads(connection.recv_bytes()))
    except BaseException as error:
        connection.send_bytes(_pickled({"value": None, "failure": failure_of(error), "logs": []}))
        return
    connection.send_bytes(_pickled({"value": os.getpid(), "failure": None, "logs": []}))
    while True:
        try:
            call: Call = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(_pickled(_answer(functions, call)))


def failure_of(error: BaseException) -> Failure:
    """Say what was raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = sys.modules.get("shoal.errors")
    is_ours = ours is not None and isinstance(error, ours.RewardError)
    return {
        "kind": type(error).__name__,
        "text": str(error) if is_ours else "\n".join(str(error).splitlines()[:5]),
        "where": f' at "{frames[-1].filename}", line {frames[-1].lineno}' if frames else "",
        "trace": "".join(traceback.format_exception(error)),
        "is_ours": is_ours,
    }


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when the thread of the trainer that started it is gone."""
    _at_end_of_parent(signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the trainer ended before its worker had begun")


def _leave_nothing_behind(descriptor: int) -> None:
    """Leave a process that waits for the end of this one, and then kills what this one has started and left.

    Reward functions run programs, and the kernel kills this process alone. Forked now, while nothing is imported and
    no thread runs.

    Args:
        descriptor: The connection, whose end the trainer must see when this process ends.
    """
    group = os.getpid()  # started as the leader of a group of its own
    if os.fork() != 0:
        return
    os.close(descriptor)
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    _at_end_of_parent(signal.SIGTERM)
    if os.getppid() == group:
        signal.sigwait({signal.SIGTERM})
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    os._exit(0)


def _at_end_of_parent(number: signal.Signals) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def _functions(setup: Setup) -> list[Callable[..., Any]]:
    sys.path[:] = setup["path"]
    if not setup["file"]:
        functions: list[Callable[..., Any]] = pickle.loads(setup["pickled"])
        return functions
    spec = importlib.util.spec_from_file_location("shoal_worker_functions", setup["file"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [getattr(module, name) for name in setup["names"]]


def _answer(functions: list[Callable[..., Any]], call: Call) -> Reply:
    logs: list[Log] = []
    try:
        keywords = pickle.loads(call["keywords"])
        if call["logs"]:
            keywords["log_extra"] = lambda column, values: logs.append(("extra", column, values))
            keywords["log_metric"] = lambda metric, value: logs.append(("metric", metric, value))
        value = functions[call["function"]](*call["arguments"], **keywords)
    except BaseException as error:
        return {"value": None, "failure": failure_of(error), "logs": logs}
    return {"value": value, "failure": None, "logs": logs}


def _pickled(reply: Reply) -> bytes:
    try:
        return pickle.dumps(reply, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        failure = failure_of(error)
        failure["text"] = f"what it returned or logged cannot be sent to the trainer: {failure['text']}"
        return pickle.dumps({"value": None, "failure": failure, "logs": []})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
