"""`shoal serve` says what it would start, and refuses what cannot work before vLLM is imported."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from shoal.cli import serve
from shoal.cli.main import main
from shoal.engines.command import EngineSpec
from shoal.engines.process import choose_ports
from shoal.errors import ConfigError, PlacementError
from shoal.placement.devices import hypothetical_gpus

KEY = "k" * 64


def spec_of(*words: str) -> EngineSpec:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.engine_spec(parser.parse_args(["--model", "some/model", *words]))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with four GPUs, and a vLLM for them."""
    monkeypatch.setattr(serve, "discover_devices", lambda: hypothetical_gpus(range(4)))
    monkeypatch.setattr(serve.vllm_compat, "is_cpu_build", lambda: False)


def test_a_dry_run_prints_commands_that_a_shell_can_run_and_no_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_ENGINE_API_KEY", "a-secret")
    words = ["--model", "some/model", "--devices", "cpu", "--host", "10.0.0.7", "--max-model-len", "512"]
    assert main(["serve", *words, "--extra-args", '{"max_num_seqs": 8}', "--dry-run"]) == 0
    *exports, command = capsys.readouterr().out.splitlines()
    assert "a-secret" not in " ".join([*exports, command])
    assert 'export SHOAL_ENGINE_API_KEY="$SHOAL_ENGINE_API_KEY"' in exports
    assert 'export VLLM_SERVER_DEV_MODE="1"' in exports
    flags = shlex.split(command)
    for flag, value in (
        ("--host", "10.0.0.7"), ("--port", "8000"), ("--max-model-len", "512"), ("--max-num-seqs", "8"),
        ("--load-format", "dummy"), ("--worker-extension-cls", "shoal.vllm_plugin.worker.ShoalWorker"),
    ):  # fmt: skip
        assert flags[flags.index(flag) + 1] == value
    assert "shoal.vllm_plugin.attach_routes.AttachRoutes" in flags


def test_the_engine_takes_as_many_gpus_as_it_has_workers(gpus: None) -> None:
    assert spec_of().cuda_devices == ("0",)
    assert spec_of("--tp", "2", "--pp", "2").cuda_devices == ("0", "1", "2", "3")
    assert spec_of("--tp", "2", "--devices", "cuda:3,cuda:1").cuda_devices == ("3", "1")
    assert spec_of("--devices", "cpu").cuda_devices == ()
    assert spec_of("--devices", "cpu").cpu_cores == tuple(sorted(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tp", "8"], "needs 8 GPUs, and there are 4"),
        (["--devices", "cuda:1,cuda:2"], "needs 1 GPUs, and there are 2"),
        (["--devices", "cuda:9"], "names cuda:9"),
        (["--devices", "colocate"], "for trainers"),
        (["--devices", "cpu:2"], "for trainers"),
    ],
)
def test_devices_that_do_not_come_out_are_refused(gpus: None, words: list[str], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        spec_of(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "80"], "--port=80"),
        (["--tp", "0"], "--tp=0"),
        (["--extra-args", "{"], "is not JSON"),
        (["--extra-args", "[]"], "no JSON object"),
    ],
)
def test_flags_that_cannot_be_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of("--devices", "cpu", *words)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["serve", "--model", "some/model", "--devices", "cpu", *words]) == 2
    return capsys.readouterr().err


def test_without_a_key_or_a_free_port_nothing_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SHOAL_ENGINE_API_KEY", raising=False)
    started: list[Any] = []
    monkeypatch.setattr(serve, "_serve", lambda spec, key: started.append(key) or 0)
    assert "No key is given" in refused(capsys)
    key_file = tmp_path / "key"
    key_file.write_text("k" * 64)
    key_file.chmod(0o644)
    assert "chmod 600" in refused(capsys, "--key-file", str(key_file))
    key_file.chmod(0o600)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "in use" in refused(capsys, "--key-file", str(key_file), "--port", str(port))
    assert started == []
    arguments = ["--model", "some/model", "--devices", "cpu", "--key-file", str(key_file), "--port", str(port)]
    assert main(["serve", *arguments]) == 0  # the control
    assert started == ["k" * 64]


# ---- the process, with a small HTTP server in vLLM's place ----

SERVER = """
import argparse, os
from http.server import BaseHTTPRequestHandler, HTTPServer

parser = argparse.ArgumentParser()
for flag in ("host", "port"):
    parser.add_argument("--" + flag)
arguments, _ = parser.parse_known_args()

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        is_allowed = self.headers.get("Authorization") == "Bearer " + os.environ["SHOAL_ENGINE_API_KEY"]
        self.send_response(200 if is_allowed else 401)
        self.end_headers()

HTTPServer((arguments.host, int(arguments.port)), Handler).serve_forever()
"""


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A running `shoal serve`, and its URL."""
    for name in ("openai/api_server", "cli/main"):
        file = tmp_path / "vllm" / "entrypoints" / f"{name}.py"
        file.parent.mkdir(parents=True)
        file.write_text(SERVER)
        for folder in (file.parent, file.parent.parent, file.parent.parent.parent):
            (folder / "__init__.py").touch()
    key_file = tmp_path / "key"
    key_file.touch(mode=0o600)
    key_file.write_text(KEY)
    (port,) = choose_ports(1, None)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "shoal", "serve", "--model", "some/model", "--devices", "cpu"),
            *("--port", str(port), "--key-file", str(key_file)),
        ],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
    url = f"http://127.0.0.1:{port}/health"
    try:
        wait_until(lambda: status(url, KEY) == 200, "the engine")
        yield process, url
    finally:
        process.kill()
        process.wait()


def status(url: str, key: str) -> int | None:
    try:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(url, headers=headers, timeout=10, trust_env=False).status_code
    except httpx.TransportError:
        return None


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_an_engine_however_shoal_serve_ends(
    serving: tuple[subprocess.Popen[bytes], str], number: signal.Signals
) -> None:
    process, url = serving
    assert status(url, "wrong") == 401
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 2  # the guard and the server
    assert not any(KEY in word for child in below for word in child.cmdline())
    process.send_signal(number)
    assert process.wait(timeout=60) == (-9 if number == signal.SIGKILL else 0)
    wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in below), "their end")
    assert status(url, KEY) is None


def test_an_engine_that_dies_is_a_failure(serving: tuple[subprocess.Popen[bytes], str]) -> None:
    process, _ = serving
    (guard,) = psutil.Process(process.pid).children()
    guard.children()[0].kill()
    assert process.wait(timeout=60) not in (0, None)
