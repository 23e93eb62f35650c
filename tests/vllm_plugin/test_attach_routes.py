"""The routes for trainers that attach, as ASGI: who holds an engine, and what follows when the trainer is gone."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

import shoal
from shoal.vllm_plugin.attach_routes import ABOUT_PATH, HOLD_PATH, AttachRoutes


class Engine:
    """Stands in for the server's client of its engine."""

    def __init__(self) -> None:
        self.num_resumed = 0
        self.engine_core = self
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(world_size=2, data_parallel_size=1),
            device_config=SimpleNamespace(device_type="cpu"),
            model_config=SimpleNamespace(
                dtype="torch.float32",
                max_model_len=64,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                hf_config=SimpleNamespace(to_dict=lambda: {"hidden_size": 8, "odd": {1, 2}.__class__}),
            ),
            lora_config=None,
            weight_transfer_config=None,
        )

    async def resume_scheduler_async(self) -> None:
        self.num_resumed += 1


class Connection:
    """One client's end of a request: what it was sent, and when it goes away."""

    def __init__(self, routes: AttachRoutes, engine: Engine, method: str, path: str, body: Any = None) -> None:
        self.sent: list[Any] = []
        self.beat = asyncio.Event()
        self._gone = asyncio.Event()
        self._has_read = False
        self._body = json.dumps(body).encode()
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [],
            "app": SimpleNamespace(state=SimpleNamespace(engine_client=engine)),
        }
        self.task = asyncio.ensure_future(routes(scope, self._receive, self._send))

    def leave(self) -> None:
        self._gone.set()

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    def json(self) -> Any:
        return json.loads(self.sent[1]["body"])

    async def _receive(self) -> dict[str, Any]:
        if not self._has_read:
            self._has_read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.beat.set()


async def _nowhere(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": []})


def test_an_engine_says_what_it_is() -> None:
    async def run() -> Any:
        asked = Connection(AttachRoutes(_nowhere), Engine(), "GET", ABOUT_PATH)
        await asked.task
        return asked.json()

    about = asyncio.run(run())
    assert about["shoal"] == shoal.__version__
    assert (about["num_workers"], about["device"], about["dtype"], about["max_model_len"]) == (2, "cpu", "float32", 64)
    assert about["model"]["hidden_size"] == 8 and about["weight_transfer"] is None


def test_one_trainer_holds_an_engine_and_its_end_lets_the_engine_go_on() -> None:
    async def run() -> None:
        routes, engine = AttachRoutes(_nowhere), Engine()
        first = Connection(routes, engine, "POST", HOLD_PATH, {"trainer": "one"})
        await asyncio.wait_for(first.beat.wait(), 60)
        assert first.status == 200 and engine.num_resumed == 0
        second = Connection(routes, engine, "POST", HOLD_PATH, {"trainer": "two"})
        await second.task
        assert (second.status, second.json()) == (409, {"trainer": "one"})
        assert engine.num_resumed == 0  # the one that was refused changes nothing
        first.leave()
        await asyncio.wait_for(first.task, 60)
        assert engine.num_resumed == 1
        third = Connection(routes, engine, "POST", HOLD_PATH, {"trainer": "three"})
        await asyncio.wait_for(third.beat.wait(), 60)
        assert third.status == 200
        third.leave()
        await asyncio.wait_for(third.task, 60)
        assert engine.num_resumed == 2

    asyncio.run(run())


def test_a_hold_that_is_cancelled_lets_the_engine_go_on_too() -> None:
    async def run() -> None:
        routes, engine = AttachRoutes(_nowhere), Engine()
        held = Connection(routes, engine, "POST", HOLD_PATH, {"trainer": "one"})
        await asyncio.wait_for(held.beat.wait(), 60)
        held.task.cancel()
        await asyncio.wait({held.task}, timeout=60)
        assert engine.num_resumed == 1

    asyncio.run(run())


def test_other_requests_pass() -> None:
    async def run() -> list[int]:
        asked = [
            Connection(AttachRoutes(_nowhere), Engine(), method, path)
            for method, path in (("POST", ABOUT_PATH), ("GET", HOLD_PATH), ("GET", "/v1/models"))
        ]
        for connection in asked:
            await connection.task
        return [connection.status for connection in asked]

    assert asyncio.run(run()) == [404, 404, 404]


HOLDER = """
import sys, time
import httpx

with httpx.stream("POST", sys.argv[1], json={"trainer": "one"}, timeout=60, trust_env=False) as answer:
    for _ in answer.iter_raw():
        print(answer.status_code, flush=True)
"""


@pytest.fixture
def served() -> Iterator[tuple[str, Engine]]:
    """The routes behind the server that vLLM uses, at a URL, and the engine behind them."""
    engine = Engine()
    routes = AttachRoutes(_nowhere)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await routes(scope | {"app": SimpleNamespace(state=SimpleNamespace(engine_client=engine))}, receive, send)

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}{HOLD_PATH}", engine
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_the_death_of_the_process_that_holds_an_engine_lets_it_go_on(served: tuple[str, Engine]) -> None:
    url, engine = served
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, url], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "200\n"
    refused = httpx.post(url, json={"trainer": "two"}, timeout=20, trust_env=False)
    assert (refused.status_code, refused.json()) == (409, {"trainer": "one"})
    assert engine.num_resumed == 0
    holder.kill()
    holder.wait()
    deadline = time.monotonic() + 30
    while engine.num_resumed == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with httpx.stream("POST", url, json={"trainer": "two"}, timeout=20, trust_env=False) as held:
        assert held.status_code == 200
