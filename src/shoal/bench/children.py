"""Stages that run in processes of their own: they may hang or take memory without harm to the others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.bench.process_group import end_group
from shoal.engines.command import LOOPBACK, without_launcher_variables
from shoal.engines.process import reason_in, tail
from shoal.errors import ShoalError


class StageError(ShoalError):
    """A stage of the benchmark gave no figures."""


def run_children(
    module: str,
    arguments: Sequence[Sequence[str]],
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Run `python -m module` once for each list of arguments, side by side; return what the first one answered.

    Args:
        module: With a `main` that writes its answer, as JSON, to the file named by its first argument.
        arguments: Of each, after that one.
        timeout_s: For all of them.
        environment: Theirs; None for this process's own, without what a launcher set for this process alone.

    Raises:
        StageError: One failed, or they took too long. None is left running; the logs stay, and the message says where.
    """
    if environment is None:
        # The children make their own groups: they must not take the launcher's variables for theirs.
        environment = without_launcher_variables(os.environ) | {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": LOOPBACK}
    folder = Path(tempfile.mkdtemp(prefix="shoal-bench-"))
    logs = [folder / f"{index}.log" for index in range(len(arguments))]
    answer = folder / "answer.json"
    children = []
    try:
        for log, words in zip(logs, arguments, strict=True):
            with log.open("wb") as file:
                command = [sys.executable, "-m", module, str(answer), *words]
                children.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        _wait(children, logs, timeout_s)
    finally:
        for child in children:
            end_group(child)  # vLLM's processes outlive the one that started them
    answered = json.loads(answer.read_text())
    shutil.rmtree(folder)
    return answered


def _wait(children: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(child.poll() is None for child in children):
        _raise_if_failed(children, logs)
        if time.monotonic() > deadline:
            raise StageError(
                f"it took more than {timeout_s:g} s; last words: {_last_words(logs[0])} (its log: {logs[0]})"
            )
        time.sleep(0.05)
    _raise_if_failed(children, logs)


def _raise_if_failed(children: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
    for child, log in zip(children, logs, strict=True):
        if child.poll() not in (None, 0):
            reason = reason_in(tail(log, 400))
            raise StageError(f"its process ended with status {child.poll()}: {reason} (its log: {log})")


def _last_words(log: Path) -> str:
    lines = [line for line in tail(log, 20) if line.strip()]
    return lines[-1][:300] if lines else "none"
