"""The route that pauses and has the workers receive, called as an ASGI server would call it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.vllm_plugin.publish_route import PATH, PublishRoute


class Engine:
    """What the route needs of vLLM's engine client; remembers the order of calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.engine_core = self

    async def pause_scheduler_async(self, mode: str, clear_cache: bool) -> None:
        await asyncio.sleep(0.3)
        self.calls.append(("paused", mode, clear_cache))

    async def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> list[Any]:
        self.calls.append((method, kwargs))
        return [{"value": [2**64 - 1]}, {"error": "no"}]


async def nothing_else(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def ask(engine: Engine, body: object, path: str = PATH, method: str = "POST") -> tuple[int, Any]:
    scope = {
        "type": "http",
        "path": path,
        "method": method,
        "headers": [],
        "app": SimpleNamespace(state=SimpleNamespace(engine_client=engine)),
    }
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(PublishRoute(nothing_else)(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))


@pytest.mark.parametrize("pauses", [True, False])
def test_the_workers_receive_once_the_engine_is_paused(pauses: bool) -> None:
    engine = Engine()
    status, answer = ask(engine, {"pauses": pauses, "kwargs": {"attempt": 3}})
    assert status == 200 and answer["results"] == [{"value": [2**64 - 1]}, {"error": "no"}]
    receiving = ("shoal_receive", {"attempt": 3})
    assert engine.calls == ([("paused", "keep", False)] if pauses else []) + [receiving]
    assert (answer["pause_s"] >= 0.2) == pauses


@pytest.mark.parametrize(("path", "method"), [(PATH, "GET"), (PATH + "/", "POST"), ("/pause", "POST")])
def test_everything_else_is_passed_on(path: str, method: str) -> None:
    engine = Engine()
    assert ask(engine, {"pauses": True, "kwargs": {}}, path, method)[0] == 404
    assert engine.calls == []
