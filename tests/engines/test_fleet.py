"""Restarting engines with real processes, guards and ports, and a small server in the place of vLLM."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from shoal.engines import process as process_module
from shoal.engines.command import EngineSpec
from shoal.engines.fleet import Fleet
from shoal.engines.process import choose_ports
from shoal.errors import EngineStartError

START_S = 60.0
SERVER = """
import http.server, pathlib, sys
port, broken = sys.argv[1:]
if pathlib.Path(broken).exists():
    raise RuntimeError("no memory left for the cache")

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Answer).serve_forever()
"""


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A file that keeps engines from starting while it is there."""
    return tmp_path / "broken"


@pytest.fixture
def fleet(broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setattr(
        process_module, "serve_command", lambda spec: [sys.executable, "-c", SERVER, str(spec.port), str(broken)]
    )
    specs = [
        EngineSpec(
            name=f"engine-{index}",
            model_dir=tmp_path,
            port=port,
            cuda_devices=(),
            cpu_cores=(),
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            dtype="float32",
            max_model_len=None,
            gpu_memory_utilization=0.9,
            cpu_kv_cache_gib=1,
            seed=0,
            extra_arguments={},
        )
        for index, port in enumerate(choose_ports(2, None))
    ]
    with Fleet.start(specs, log_dir=tmp_path / "logs", timeout_s=START_S, request_timeout_s=5) as running:
        yield running


def kill(fleet: Fleet, index: int) -> list[psutil.Process]:
    """End an engine the hard way, but not its guard; return all that it was."""
    guard = psutil.Process(fleet.engines[index].process.pid)
    (server,) = guard.children()
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: fleet.why_ended(f"engine-{index}") is not None)
    return [guard, server]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def restart(fleet: Fleet, name: str) -> None:
    fleet.end(name)
    fleet.restart(name, timeout_s=START_S, stop=threading.Event())


def test_a_killed_engine_is_started_again_on_its_port_with_a_log_of_its_own_and_the_other_runs_on(fleet: Fleet) -> None:
    first, other = fleet.engines
    tree = kill(fleet, 0)
    restart(fleet, "engine-0")
    again = fleet.engines[0]
    assert again.client.is_healthy() and again.spec == first.spec and again.client.url == first.client.url
    assert again.client is not first.client and again.process.pid != first.process.pid
    assert again.process.log_path == first.process.log_path.with_name("engine-0.restart-1.log")
    assert not [one for one in tree if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert fleet.engines[1] is other and other.client.is_healthy()
    fleet.check_alive()
    kill(fleet, 0)  # a second life ends as the first one did
    restart(fleet, "engine-0")
    assert fleet.engines[0].process.log_path.name == "engine-0.restart-2.log"


def test_one_whose_port_somebody_else_has_taken_gets_another(fleet: Fleet) -> None:
    port = fleet.engines[0].spec.port
    kill(fleet, 0)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        restart(fleet, "engine-0")
        assert fleet.engines[0].spec.port != port
        assert fleet.engines[0].client.is_healthy() and str(fleet.engines[0].spec.port) in fleet.engines[0].client.url


def test_a_stopped_engine_is_ended_before_another_takes_its_place(fleet: Fleet) -> None:
    guard = psutil.Process(fleet.engines[0].process.pid)
    (server,) = guard.children()
    server.suspend()
    restart(fleet, "engine-0")
    assert not server.is_running() and fleet.engines[0].client.is_healthy()


def test_one_that_does_not_start_says_why_leaves_nothing_and_can_be_tried_again(fleet: Fleet, broken: Path) -> None:
    kill(fleet, 0)
    broken.touch()
    with pytest.raises(EngineStartError, match=r"engine-0 could not start .*no memory left for the cache"):
        restart(fleet, "engine-0")
    assert fleet.engines[0].process.exit_status() is not None
    fleet.check_alive()  # it is known to be away
    broken.unlink()
    restart(fleet, "engine-0")
    assert fleet.engines[0].client.is_healthy()


def test_a_restart_that_is_not_wanted_any_more_leaves_nothing(fleet: Fleet) -> None:
    kill(fleet, 0)
    stop = threading.Event()
    stop.set()
    with pytest.raises(EngineStartError, match="the run has ended"):
        fleet.restart("engine-0", timeout_s=START_S, stop=stop)
    assert fleet.engines[0].process.exit_status() is not None and not fleet.engines[0].client.is_healthy()
