"""Engines on two Ray nodes of this machine, with a small HTTP server for vLLM: it is Ray's part that is tried."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal.engines.command import EngineSpec
from shoal.engines.fleet import Fleet
from shoal.engines.ray_engine import RayEngine, RayLauncher
from shoal.errors import ConfigError, EngineStartError

pytestmark = pytest.mark.timeout(600)

SERVER = """
import argparse, json, os, pathlib
from http.server import BaseHTTPRequestHandler, HTTPServer

parser = argparse.ArgumentParser()
for flag in ("host", "port", "model"):
    parser.add_argument("--" + flag)
arguments, _ = parser.parse_known_args()
config = json.loads((pathlib.Path(arguments.model) / "config.json").read_text())
print("serving a", config["model_type"], flush=True)
if config["model_type"] == "broken":
    raise ValueError("this model is broken")

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        is_allowed = self.headers.get("Authorization") == "Bearer " + os.environ["SHOAL_ENGINE_API_KEY"]
        self.send_response(200 if is_allowed else 401)
        self.end_headers()

HTTPServer((arguments.host, int(arguments.port)), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without cores, and two nodes with one each, whose vLLM is the server above."""
    import ray
    from ray.cluster_utils import Cluster

    fake = tmp_path_factory.mktemp("fake") / "vllm" / "entrypoints" / "openai"
    fake.mkdir(parents=True)
    for folder in (fake, fake.parent, fake.parent.parent):
        (folder / "__init__.py").touch()
    for name in ("openai/api_server", "cli/main"):
        (fake.parent / name).parent.mkdir(exist_ok=True)
        (fake.parent / f"{name}.py").write_text(SERVER)
    (fake.parent / "cli" / "__init__.py").touch()
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{fake.parents[2]}:{before}"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        os.environ["PYTHONPATH"] = before
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster
    finally:
        os.environ["PYTHONPATH"] = before
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "fine"}')
    return folder


def start(specs: list[EngineSpec], logs: Path, timeout_s: float = 180) -> Fleet:
    launch = RayLauncher(on_gpus=False, timeout_s=timeout_s)
    return Fleet.start(specs, log_dir=logs, timeout_s=180, request_timeout_s=30, launch=launch)


def engine_processes(fleet: Fleet) -> list[list[psutil.Process]]:
    """Return, for each engine, its guard and its server, found by their port."""
    ports = [engine.client.url.rpartition(":")[2] for engine in fleet.engines]
    found: list[list[psutil.Process]] = [[] for _ in ports]
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        for processes, port in zip(found, ports, strict=True):
            if "--port" in words and words[words.index("--port") + 1] == port:
                processes.append(process)
    return found


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def are_gone(processes: list[psutil.Process]) -> bool:
    return not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_an_engine_whose_cluster_was_left_is_told_lost_and_ended_without_joining_one_again(
    make_spec: Any, tmp_path: Path
) -> None:
    class Untouched:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked of an actor that is gone")

    def again(log_path: Path) -> Any:
        raise AssertionError("nothing is started again")

    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()  # as after `ray.shutdown()`; any call of Ray's would change that
    engine = RayEngine(make_spec("engine-0", 0, model_dir=tmp_path), Untouched(), object(), tmp_path / "log", again)
    wait_until(lambda: engine.exit_status() is not None, "the loss of the cluster")
    assert engine.why_it_died() == "the trainer has left the Ray cluster"
    engine.ask_to_end()
    engine.wait_ended()
    assert not ray.is_initialized()


def test_each_node_gets_an_engine_whose_log_arrives_here_and_all_end_with_the_fleet(
    cluster: Any, make_spec: Any, model_dir: Path, tmp_path: Path
) -> None:
    specs = [make_spec(f"engine-{index}", 0, model_dir=model_dir) for index in range(2)]
    with start(specs, tmp_path / "logs") as fleet:
        processes = engine_processes(fleet)
        assert [len(each) for each in processes] == [2, 2]  # guard and server
        key = fleet.engines[0].client._sync.headers["authorization"].removeprefix("Bearer ")
        assert len(key) == 64
        assert not any(key in word for each in processes for process in each for word in process.cmdline())
        nodes = {process.parents()[1].pid for process in (each[0] for each in sorted(processes, key=len))}
        assert len(nodes) == 2  # under two raylets
        for engine in fleet.engines:
            assert engine.client.is_healthy()  # it has the key
            wait_until(lambda e=engine: "serving a fine" in e.process.log_path.read_text(), "its log")
        fleet.check_alive()

        # A third finds no room, and says so.
        with pytest.raises(ConfigError, match=r"1 of 1 engines found no Ray node within 2 s with 1 free CPUs each"):
            start([make_spec("engine-2", 0, model_dir=model_dir)], tmp_path / "logs", timeout_s=2)
    assert all(map(are_gone, processes))


def test_an_engine_that_cannot_start_is_an_error_with_its_own_words(
    cluster: Any, make_spec: Any, model_dir: Path, tmp_path: Path
) -> None:
    (model_dir / "config.json").write_text('{"model_type": "broken"}')
    with pytest.raises(EngineStartError, match=r"engine-0 could not start.*ValueError: this model is broken"):
        start([make_spec("engine-0", 0, model_dir=model_dir)], tmp_path / "logs")


def test_an_engine_that_dies_and_a_node_that_is_killed_are_told_apart_and_nothing_is_left(
    cluster: Any, make_spec: Any, model_dir: Path, tmp_path: Path
) -> None:
    specs = [make_spec(f"engine-{index}", 0, model_dir=model_dir) for index in range(2)]
    with start(specs, tmp_path / "logs") as fleet:
        first, second = engine_processes(fleet)
        max(first, key=lambda process: len(process.parents())).kill()  # the server, not its guard
        wait_until(lambda: fleet.why_ended("engine-0") is not None, "the death")
        assert "ended with status" in (fleet.why_ended("engine-0") or "")
        handle = fleet.engines[0].process
        assert isinstance(handle, RayEngine)
        again, url = handle.start_again()
        assert again.log_path.name == "engine-0.restart-1.log" and again.exit_status() is None
        assert url != fleet.engines[0].client.url

        (raylet,) = {process.pid for process in second[0].parents() + second[1].parents()} & {
            node.all_processes["raylet"][0].process.pid for node in cluster.worker_nodes
        }
        node = next(n for n in cluster.worker_nodes if n.all_processes["raylet"][0].process.pid == raylet)
        cluster.remove_node(node, allow_graceful=False)
        wait_until(lambda: fleet.why_ended("engine-1") is not None, "the loss of the node")
        assert "its node or its Ray actor is gone" in (fleet.why_ended("engine-1") or "")
        wait_until(lambda: are_gone(second), "the engine of the node that was killed")
        again.ask_to_end()
        again.wait_ended()
    assert are_gone(first)
