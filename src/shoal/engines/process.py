"""One engine's process: start it behind its guard, see whether it lives, end it, and explain why it died."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shoal.engines.command import LOOPBACK, EngineSpec, serve_command, serve_environment
from shoal.engines.guard import GRACE_S
from shoal.errors import ConfigError

_REASON = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception|Interrupt)(?:: .+|$)")
_REASON_LENGTH = 400

# What vLLM logs on its way up, latest first, and what to call it.
_STAGES = (
    ("Starting vLLM server", "starting its server"),
    ("Capturing CUDA graphs", "capturing CUDA graphs"),
    ("KV cache size", "warming up"),
    ("Compiling a graph", "compiling"),
    ("Initializing model took", "sizing its cache"),
    ("Loading model weights took", "sizing its cache"),
    ("Starting to load model", "building the model"),
    ("EngineCore", "starting its workers"),
    ("vLLM API server version", "starting its engine core"),
    ("version 0.", "starting its engine core"),
)


class EngineProcess:
    """A `vllm serve` behind its guard, writing to a log file of its own.

    Args:
        spec: What to start.
        api_key: The run's key.
        log_path: Created or overwritten.
    """

    def __init__(self, spec: EngineSpec, api_key: str, log_path: Path) -> None:
        self.spec = spec
        self.log_path = log_path
        self._api_key = api_key
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("wb") as log:
            self._guard = subprocess.Popen(
                guarded_command(spec),
                env=serve_environment(spec, api_key, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C goes to the trainer alone, which then ends its engines in order.
                start_new_session=True,
            )

    @property
    def has_plugin(self) -> bool:
        """Always: `serve_command` sees to it."""
        return True

    @property
    def num_workers(self) -> int:
        """vLLM's worker processes."""
        return self.spec.num_workers

    @property
    def pid(self) -> int:
        """Process id of the guard."""
        return self._guard.pid

    def exit_status(self) -> int | None:
        """Return the engine's exit status, or None while it lives."""
        return self._guard.poll()

    def ask_to_end(self) -> None:
        """Begin ending the engine; `wait_ended` finishes it."""
        if self._guard.poll() is None:
            self._guard.send_signal(signal.SIGTERM)

    def wait_ended(self) -> None:
        """Wait until no process of the engine is left. The guard kills what does not end in time."""
        try:
            self._guard.wait(timeout=GRACE_S + 20.0)
        except subprocess.TimeoutExpired:
            # Only a guard that is itself stuck gets here (stopped by a debugger, say).
            self._guard.kill()
            self._guard.wait()

    def start_again(self) -> tuple[EngineProcess, str]:
        """Start the engine anew once nothing of this one is left; return the new one, and the URL that it will have.

        It gets the same port if that is free, else another, and a log file of its own: this one says why it was lost.
        """
        self.ask_to_end()
        self.wait_ended()
        spec, host = self.spec, self.spec.host
        if not is_free(spec.port, host):
            spec = replace(spec, port=choose_ports(1, None, host)[0])
        log_path = next_log_path(self.log_path)
        return EngineProcess(spec, self._api_key, log_path), f"http://{host}:{spec.port}"

    def why_it_died(self) -> str:
        """Return the log's most telling line, for an error message."""
        return reason_in(tail(self.log_path, 400))

    def stage(self) -> str:
        """Say in a few words how far the start is, from what the log has said so far."""
        return stage_in(tail(self.log_path, 400))


def guarded_command(spec: EngineSpec) -> list[str]:
    """Return the argument vector of an engine behind a guard that ends it with this process."""
    guard = [sys.executable, "-m", "shoal.engines.guard", "--parent", str(os.getpid())]
    if spec.cpu_cores and not spec.is_on_gpus:
        guard += ["--cores", ",".join(str(core) for core in spec.cpu_cores)]
    return [*guard, "--", *serve_command(spec)]


def launch_here(specs: Sequence[EngineSpec], api_key: str, log_dir: Path) -> list[tuple[EngineProcess, str]]:
    """Start engines on this host; a `Launch`. Each writes to `<log_dir>/<name>.log`."""
    started: list[tuple[EngineProcess, str]] = []
    try:
        for spec in specs:
            process = EngineProcess(spec, api_key, log_dir / f"{spec.name}.log")
            started.append((process, f"http://{spec.host}:{spec.port}"))
    except BaseException:
        for process, _ in started:
            process.ask_to_end()
        for process, _ in started:
            process.wait_ended()
        raise
    return started


def reason_in(lines: Sequence[str]) -> str:
    """Return the most telling of a log's lines: the last error that is not a mere consequence of another."""
    reasons = []
    for index, line in enumerate(lines):
        if match := _REASON.search(line):
            # pydantic says on the next line what is wrong.
            more = " ".join(lines[index + 1 : index + 2]).strip() if "validation error" in line else ""
            reasons.append(f"{match.group(0)} {more}")
    # vLLM ends with a general "Engine core initialization failed" after the line that says why.
    telling = [reason for reason in reasons if "Engine core" not in reason and "cancelled" not in reason.lower()]
    candidates = telling or reasons or [line for line in lines if line.strip()]
    return candidates[-1].strip()[:_REASON_LENGTH] if candidates else "its log is empty"


def stage_in(lines: Sequence[str]) -> str:
    """Say how far a start is whose log has said `lines`."""
    said = "\n".join(lines)
    return next((words for mark, words in _STAGES if mark in said), "importing vLLM")


def tail(path: Path, num_lines: int) -> list[str]:
    """Return the last lines of a text file (at most 64 KiB of it)."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - (64 << 10)))
        return file.read().decode(errors="replace").splitlines()[-num_lines:]


def next_log_path(path: Path) -> Path:
    """Return where the next life of an engine writes: `engine-0.log`, then `engine-0.restart-1.log`, and so on."""
    match = re.fullmatch(r"(.+)\.restart-(\d+)", path.stem)
    stem, number = (match[1], int(match[2])) if match else (path.stem, 0)
    return path.with_name(f"{stem}.restart-{number + 1}{path.suffix}")


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether an engine could listen on this port of `host`."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True


def choose_ports(num_engines: int, base_port: int | None, host: str = LOOPBACK) -> list[int]:
    """Return a port of `host` for each engine: free ones, or `base_port` and those after it.

    Raises:
        ConfigError: A port of the range asked for is taken.
    """
    if base_port is None:
        sockets = [socket.socket() for _ in range(num_engines)]
        try:
            for listener in sockets:
                listener.bind((host, 0))
            return [int(listener.getsockname()[1]) for listener in sockets]
        finally:
            for listener in sockets:
                listener.close()
    ports = list(range(base_port, base_port + num_engines))
    for port in ports:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
            except OSError as error:
                raise ConfigError(
                    f"vllm_base_port={base_port} needs ports {ports[0]} to {ports[-1]}, but {port} is in use on "
                    f"{host} ({error.strerror}). Choose another base, or leave vllm_base_port unset for free ports."
                ) from error
    return ports
