"""The API-key gate, called as an ASGI server would call it."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from shoal.vllm_plugin.gate import KEY_VARIABLE, ApiKeyGate

KEY = "0123456789abcdef"
PATHS = (
    "/health",
    "/pause",
    "/resume",
    "/v1/models",
    "/v1/completions",
    "/init_weight_transfer_engine",
    "/update_weights",
    "/collective_rpc",
    "/shoal/receive",
    "/metrics",
    "/docs",
    "/openapi.json",
    "/",
    "",
    "//health",
    "/v1/../health",
    "/nowhere",
)
WRONG = {
    "no key": [],
    "an empty value": [(b"authorization", b"")],
    "another key": [(b"authorization", b"Bearer fedcba9876543210")],
    "a shorter key": [(b"authorization", f"Bearer {KEY[:-1]}".encode())],
    "a longer key": [(b"authorization", f"Bearer {KEY}0".encode())],
    "the key alone": [(b"authorization", KEY.encode())],
    "another scheme": [(b"authorization", f"Basic {KEY}".encode())],
    "another case": [(b"authorization", f"Bearer {KEY.upper()}".encode())],
    "bytes that are no text": [(b"authorization", b"\xff\xfe")],
    "the key under another header": [(b"x-api-key", KEY.encode())],
    "the right key twice": [(b"authorization", f"Bearer {KEY}".encode())] * 2,
    "the right key and a wrong one": [
        (b"authorization", f"Bearer {KEY}".encode()),
        (b"Authorization", b"Bearer no"),
    ],
}
RIGHT = [(b"authorization", f"Bearer {KEY}".encode())]


class App:
    """Answers 200 to everything and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        self.seen.append(str(scope.get("path", scope["type"])))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"served"})


@pytest.fixture(autouse=True)
def key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def ask(
    gate: ApiKeyGate, path: str, headers: list[tuple[bytes, bytes]], kind: str = "http", method: str = "GET"
) -> list[MutableMapping[str, Any]]:
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": kind,
        "path": path,
        "method": method,
        "headers": headers,
        "query_string": b"api_key=" + KEY.encode(),
    }
    asyncio.run(gate(scope, receive, send))
    return sent


@pytest.mark.parametrize("path", PATHS)
def test_every_path_refuses_every_wrong_key_and_never_reaches_the_app(path: str) -> None:
    app = App()
    gate = ApiKeyGate(app)
    for what, headers in WRONG.items():
        for method in ("GET", "POST", "OPTIONS", "HEAD"):
            start, body = ask(gate, path, headers, method=method)
            assert start["status"] == 401, what
            assert KEY.encode() not in body["body"]
    assert app.seen == []


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_served_with_the_right_key(path: str) -> None:
    app = App()
    start, body = ask(ApiKeyGate(app), path, RIGHT)
    assert (start["status"], body["body"]) == (200, b"served")
    assert app.seen == [path]


def test_the_headers_name_may_be_written_in_any_case() -> None:
    start, _ = ask(ApiKeyGate(App()), "/health", [(b"AuthoriZation", RIGHT[0][1])])
    assert start["status"] == 200


def test_a_websocket_without_the_key_is_closed_before_it_opens() -> None:
    app = App()
    assert ask(ApiKeyGate(app), "/v1/realtime", [], kind="websocket") == [{"type": "websocket.close", "code": 1008}]
    assert app.seen == []


def test_a_websocket_with_the_key_reaches_the_app() -> None:
    app = App()
    ask(ApiKeyGate(app), "/v1/realtime", RIGHT, kind="websocket")
    assert app.seen == ["/v1/realtime"]


def test_the_servers_own_start_and_end_pass_without_a_key() -> None:
    app = App()
    ask(ApiKeyGate(app), "lifespan", [], kind="lifespan")
    assert app.seen == ["lifespan"]


@pytest.mark.parametrize("value", [None, ""])
def test_an_engine_without_a_key_refuses_to_start(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv(KEY_VARIABLE)
    else:
        monkeypatch.setenv(KEY_VARIABLE, value)
    with pytest.raises(RuntimeError, match=KEY_VARIABLE):
        ApiKeyGate(App())
