"""Talk to one vLLM server over HTTP: ask for completions, and drive the routes that control it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import httpx

from shoal.engines.answers import (
    MOST_CONTROL_BYTES,
    MOST_METRICS_BYTES,
    TooLongError,
    most_json_bytes,
    parse_completion,
    parse_json,
    read_bounded,
    read_bounded_now,
    read_error,
)
from shoal.engines.command import SERVED_MODEL_NAME
from shoal.engines.lean import LeanRoute
from shoal.engines.vllm_metrics import parse_metrics
from shoal.errors import EngineFaultError, EngineRequestError
from shoal.types import UNPROVEN, EngineReport, Rollout, RolloutRequest

_CONNECT_TIMEOUT_S = 10.0
# vLLM closes a connection after 5 idle seconds. Both sides keeping it that long, as is httpx's default too, would now
# and then send a request into a connection that is being closed.
_KEEP_ALIVE_S = 2.0
_REPORT_TIMEOUT_S = 10.0
_OVERLOADED = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS)
_RUNNING_METRIC = "vllm:num_requests_running"
FLUSH_TOKENS = 64
"""An engine that dies costs each completion at most this many tokens, and twice as many rarely."""


class EngineClient:
    """A `RolloutEngine` that is a vLLM server.

    The asynchronous half (`generate`) belongs to one event loop; the synchronous half may be called from any thread.

    Args:
        name: For messages and metrics.
        url: Such as `"http://127.0.0.1:8000"`.
        api_key: The run's key; empty for a server without one.
        log_path: Named in errors; None for a server that somebody else started.
        request_timeout_s: Longest that one completion may take.
        model: What completions are asked of, such as an adapter that the server serves by that name.
        has_plugin: Whether the server runs our plugin; completions then come by its own route (decision 11).
        flush_tokens: With the plugin: tokens of a completion that it sends on together; 0 for whole completions only.
    """

    def __init__(
        self,
        *,
        name: str,
        url: str,
        api_key: str,
        log_path: Path | None,
        request_timeout_s: float,
        model: str = SERVED_MODEL_NAME,
        has_plugin: bool = False,
        flush_tokens: int = FLUSH_TOKENS,
    ) -> None:
        self._name = name
        self._model = model
        self._api_key = api_key
        self._request_timeout_s = request_timeout_s
        self.url = url
        self.log_path = log_path
        self.weight_version = UNPROVEN
        """Version of the weights that this engine was last proven to hold."""
        self.cache_salt = ""
        """Changes with the weights: what one salt has put into the prefix cache, no other is given."""
        self._was_cut: dict[str, bool] = {}  # of the requests under way that have a name
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(request_timeout_s, connect=_CONNECT_TIMEOUT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_ALIVE_S)
        # `trust_env=False`: a proxy from the environment must not see loopback traffic.
        self._async = httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, limits=limits, trust_env=False)
        self._sync = httpx.Client(base_url=url, headers=headers, timeout=timeout, limits=limits, trust_env=False)
        self._lean: LeanRoute | None = None
        if has_plugin:
            self._lean = LeanRoute(
                self._async,
                engine=name,
                model=model,
                timeout_s=request_timeout_s,
                flush_tokens=flush_tokens,
                see_log=self._see_log(),
            )

    @property
    def name(self) -> str:
        """Short name."""
        return self._name

    async def generate(self, request: RolloutRequest) -> Rollout:
        """Write one completion.

        Raises:
            EngineRequestError: The engine refused the request, or its weights do not compute.
            EngineFaultError: The engine failed, took too long, or answered with something malformed.
        """
        version = self.weight_version
        if self._lean is not None:
            return await self._lean.write(request, version=version, salt=self.cache_salt)
        body = {
            "model": self._model,
            "prompt": list(request.prompt_token_ids),
            "n": 1,
            "seed": request.seed,
            "temperature": request.sampling.temperature,
            "top_k": request.sampling.top_k,
            "top_p": request.sampling.top_p,
            "min_p": request.sampling.min_p,
            "max_tokens": request.sampling.max_tokens,
            "stop_token_ids": list(request.sampling.stop_token_ids),
            # With no tokens that end a completion, the tokenizer's own does not either.
            "ignore_eos": not request.sampling.stop_token_ids,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        if self.cache_salt:
            body["cache_salt"] = self.cache_salt
        headers = {"X-Request-Id": request.name} if request.name else None
        self._was_cut[request.name] = False
        most_bytes = most_json_bytes(request.sampling.max_tokens, len(request.prompt_token_ids))
        try:
            text = await self._fetch("POST", "/v1/completions", most_bytes, json=body, headers=headers)
        finally:
            was_cut = self._was_cut.pop(request.name, False)
        answer = parse_json(self._name, "/v1/completions", text)
        return parse_completion(self._name, answer, version=version, was_cut=was_cut)

    async def cut(self, name: str) -> None:
        """Have the completion of this name end, and return what it has so far.

        Raises:
            EngineRequestError: The engine did not take it.
        """
        if self._lean is not None:
            await self._lean.cut(name)
            return
        if name not in self._was_cut:
            return
        self._was_cut[name] = True
        try:
            # vLLM's own name for the only completion of the request.
            body = {"request_ids": [f"cmpl-{name}-0"]}
            response = await self._async.post("/abort_requests", json=body, timeout=_REPORT_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise self._failure("/abort_requests", error, _REPORT_TIMEOUT_S) from error
        self._check_status("/abort_requests", response)

    def written(self, name: str) -> Rollout | None:
        """Return what has been received so far of the completion of this name; None without the plugin."""
        return None if self._lean is None else self._lean.written(name)

    async def report(self) -> EngineReport:
        """Say what the engine is doing, by its own metrics.

        Raises:
            EngineFaultError: It did not answer, or with something that vLLM's metrics are not.
        """
        text = await self._fetch("GET", "/metrics", MOST_METRICS_BYTES, timeout=_REPORT_TIMEOUT_S)
        report = parse_metrics(text.decode(errors="replace"))
        if report is None:
            raise EngineFaultError(f"{self._name} answered /metrics with something that is not vLLM's{self._see_log()}")
        return report

    def post(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        """Call a control route and return its parsed answer; None for an empty one (`/wake_up` in vLLM 0.26).

        Raises:
            EngineRequestError: It failed, or took longer than `timeout_s`.
        """
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
        # Not kept: vLLM's server drops the connection after an error, and the next call would run into that.
        headers = {"Connection": "close"}
        try:
            with self._sync.stream("POST", path, json=body, headers=headers, timeout=timeout) as response:
                content = read_bounded_now(response, MOST_CONTROL_BYTES)
        except httpx.HTTPError as error:
            raise self._failure(path, error, timeout_s) from error
        except TooLongError as error:
            raise self._too_long(path, error) from error
        if response.status_code != httpx.codes.OK:
            raise self._refusal(path, response.status_code, content[:500].decode(errors="replace"))
        return parse_json(self._name, path, content) if content else None

    def is_healthy(self) -> bool:
        """Whether the server answers `/health` with 200."""
        try:
            return self._sync.get("/health", timeout=2.0).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def has_died(self) -> bool:
        """Whether the server is gone, or says that its engine is. An answer that does not come in time says nothing."""
        try:
            status = self._sync.get("/health", headers={"Connection": "close"}, timeout=2.0).status_code
        except httpx.TimeoutException:
            return False
        except httpx.HTTPError:
            return True
        return status == httpx.codes.SERVICE_UNAVAILABLE

    def num_running(self, timeout_s: float) -> int:
        """Return how many completions the engine is writing, by its own metrics.

        Raises:
            EngineRequestError: It gave none within `timeout_s`.
        """
        try:
            text = self._sync.get("/metrics", headers={"Connection": "close"}, timeout=timeout_s).text
        except httpx.HTTPError as error:
            raise self._failure("/metrics", error, timeout_s) from error
        values = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(_RUNNING_METRIC + "{")]
        try:
            return round(sum(map(float, values))) if values else self._no_running()
        except (ValueError, OverflowError):
            return self._no_running()

    def _no_running(self) -> NoReturn:
        raise EngineRequestError(f"{self._name} has no {_RUNNING_METRIC} among its metrics{self._see_log()}")

    def for_next_life(self, url: str, log_path: Path | None) -> EngineClient:
        """Return a client of the process that takes this one's place, which knows nothing yet of weights."""
        return EngineClient(
            name=self._name,
            url=url,
            api_key=self._api_key,
            log_path=log_path,
            request_timeout_s=self._request_timeout_s,
            model=self._model,
        )

    async def aclose(self) -> None:
        """Close the asynchronous half, in the loop that used it."""
        if self._lean is not None:
            await self._lean.aclose()
        await self._async.aclose()

    def close(self) -> None:
        """Close the synchronous half."""
        self._sync.close()

    async def _fetch(self, method: str, path: str, most_bytes: int, **arguments: Any) -> bytes:
        """Return the body of an answer that says that all is well.

        Raises:
            EngineRequestError: There is none within the time, or it is longer than `most_bytes`.
        """
        timeout_s = arguments.get("timeout", self._request_timeout_s)
        try:
            async with self._async.stream(method, path, **arguments) as response:
                if response.status_code != httpx.codes.OK:
                    raise self._refusal(path, response.status_code, await read_error(response))
                return await read_bounded(response, most_bytes)
        except httpx.HTTPError as error:
            raise self._failure(path, error, timeout_s) from error
        except TooLongError as error:
            raise self._too_long(path, error) from error

    def _check_status(self, path: str, response: httpx.Response) -> None:
        if response.status_code != httpx.codes.OK:
            raise self._refusal(path, response.status_code, response.text)

    def _refusal(self, path: str, status: int, said: str) -> EngineRequestError:
        # What is wrong with the request (4xx) is wrong everywhere; what is too much here may not be so elsewhere.
        kind = EngineRequestError if 400 <= status < 500 and status not in _OVERLOADED else EngineFaultError
        return kind(f"{self._name} answered {path} with status {status}: {said[:500]}{self._see_log()}")

    def _too_long(self, path: str, error: TooLongError) -> EngineFaultError:
        return EngineFaultError(f"{self._name} answered {path} with {error}{self._see_log()}")

    def _failure(self, path: str, error: httpx.HTTPError, timeout_s: float | None = None) -> EngineFaultError:
        what = f"did not answer {path}"
        if isinstance(error, httpx.TimeoutException) and timeout_s is not None:
            what += f" within {timeout_s:g} s"
        return EngineFaultError(f"{self._name} {what}: {type(error).__name__} {error}{self._see_log()}")

    def _see_log(self) -> str:
        return f" (see {self.log_path})" if self.log_path is not None else ""
