"""A vLLM server without vLLM that sleeps as vLLM does, behind real HTTP: what it writes follows from what it holds."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from torch import nn

from shoal.errors import EngineRequestError
from shoal.testing.loopback import LoopbackEngine
from shoal.types import ParameterMeta
from shoal.wire.plan import dtype_from_name

_TIMEOUT_S = 120.0
_VOCABULARY = 250


class HeldWeights(nn.Module):
    """A worker's model that holds a checkpoint's parameters as they come, for `SleepingEngine`.

    Args:
        parameters: Of the checkpoint.
    """

    def __init__(self, parameters: Sequence[ParameterMeta]) -> None:
        super().__init__()
        self.places = {meta.name: f"p{index}" for index, meta in enumerate(parameters)}
        for meta in parameters:
            value = torch.zeros(meta.shape, dtype=dtype_from_name(meta.dtype))
            self.register_parameter(self.places[meta.name], nn.Parameter(value, requires_grad=False))
        self.register_buffer("scale", torch.full((3,), 2.0))

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy each value to its place, as vLLM's loaders do."""
        for name, value in weights:
            self.get_parameter(self.places[name]).data.copy_(value)

    def held(self) -> dict[str, torch.Tensor]:
        """Return what is held, by the checkpoint's names."""
        return {name: self.get_parameter(place).data for name, place in self.places.items()}


class SleepingEngine(LoopbackEngine):
    """A `LoopbackEngine` with the states of vLLM's sleep (0.26 to 0.33), served at `url`. Close it with `stop`.

    Asleep, it takes requests and does not answer them. After level 2 its weights are NaN, until they are received anew.
    What would be an access to memory that is not mapped ends it: receiving or writing while that memory is asleep.

    Args:
        name: Of the engine.
        models: One for each worker; all hold the same.

    Attributes:
        num_reports: How often its metrics were asked for.
    """

    def __init__(self, name: str, models: Sequence[HeldWeights]) -> None:
        super().__init__(name, models)
        self.models = models
        self.asleep: set[str] = set()
        self.num_reports = 0
        self._saved: dict[str, list[torch.Tensor]] = {}
        self._changed = threading.Condition()
        self._server = _serve(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def post(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        """Answer a control route."""
        parts = urlsplit(path)
        if parts.path == "/abort_requests":
            return {}  # it has written before one could be aborted
        if parts.path not in ("/sleep", "/wake_up"):
            if (body or {}).get("method", parts.path) == "/shoal/receive" and "weights" in self.asleep:
                self._die("it received weights into memory that was not mapped")
            answer = super().post(path, body, timeout_s)
            self._notify()
            return answer
        self._note(path, timeout_s)
        query = parse_qs(parts.query)
        if parts.path == "/sleep":
            self._sleep(int(query["level"][0]))
        else:
            self._wake(query["tags"])
        self._notify()
        return {"status": "sleeping" if self.asleep else "awake"}

    def complete(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Write one completion, once it is awake."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self.is_paused or self.is_dead, _TIMEOUT_S):
                raise EngineRequestError(f"{self.name} does not go on")
        if self.asleep:
            self._die("it wrote while it was asleep")
        tokens = completion_of(self.models[0].held(), request["prompt"], request["seed"], request["max_tokens"])
        finite = all(bool(value.isfinite().all()) for model in self.models for value in model.held().values())
        logprobs = [-0.5 if finite else float("nan")] * len(tokens)
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}, "finish_reason": "length"}
        return {"choices": [choice]}

    def stop(self) -> None:
        """End the server."""
        self.is_dead = True
        self._notify()
        self._server.shutdown()
        self._server.server_close()

    def _sleep(self, level: int) -> None:
        self.is_paused = True
        if "weights" in self.asleep:
            return  # vLLM warns and leaves it
        self.asleep = {"weights", "kv_cache"}
        for model in self.models:
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                if level == 1 or name == "scale":
                    self._saved.setdefault(name, []).append(value.data.clone())
                value.data.fill_(torch.nan)

    def _wake(self, tags: Sequence[str]) -> None:
        if not set(tags) <= self.asleep:
            return  # vLLM warns and leaves it
        self.asleep -= set(tags)
        if "weights" in tags:
            for name, values in self._saved.items():
                for model, value in zip(self.models, values, strict=True):
                    dict([*model.named_parameters(), *model.named_buffers()])[name].data.copy_(value)
            self._saved.clear()
        self.is_paused = bool(self.asleep)

    def _die(self, reason: str) -> None:
        self.is_dead = True
        self._notify()
        raise EngineRequestError(f"{self.name}: an illegal memory access was encountered: {reason}")

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


def completion_of(weights: Mapping[str, torch.Tensor], prompt: Sequence[int], seed: int, num_tokens: int) -> list[int]:
    """Return the tokens that an engine with these weights writes: others as soon as one bit differs."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    tokens = []
    for index in range(num_tokens):
        state = digest.copy()
        state.update(json.dumps([list(prompt), seed, index]).encode())
        tokens.append(3 + state.digest()[0] % _VOCABULARY)
    return tokens


def _serve(engine: SleepingEngine) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections, as vLLM's server does

        def do_GET(self) -> None:
            if self.path == "/metrics":
                engine.num_reports += 1
                self._answer(200, "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n")
            else:
                self._answer(503 if engine.is_dead else 200, "")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
            try:
                if self.path == "/v1/completions":
                    answer = engine.complete(body)
                else:
                    answer = engine.post(self.path, body, _TIMEOUT_S)
                self._answer(200, json.dumps(answer))
            except EngineRequestError as error:
                self._answer(500, json.dumps({"error": str(error)}))

        def log_message(self, *args: Any) -> None: ...

        def _answer(self, status: int, text: str) -> None:
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                return  # the client gave up

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True, name=engine.name).start()
    return server
