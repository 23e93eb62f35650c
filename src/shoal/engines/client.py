"""Talk to one vLLM server over HTTP: ask for completions, and drive the routes that control it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from shoal.engines.command import SERVED_MODEL_NAME
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
    ) -> None:
        self._name = name
        self._model = model
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
        body = {
            "model": self._model,
            "prompt": list(request.prompt_token_ids),
            "n": 1,
            "seed": request.seed,
            "temperature": request.sampling.temperature,
            "max_tokens": request.sampling.max_tokens,
            "stop_token_ids": list(request.sampling.stop_token_ids),
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        if self.cache_salt:
            body["cache_salt"] = self.cache_salt
        headers = {"X-Request-Id": request.name} if request.name else None
        self._was_cut[request.name] = False
        try:
            response = await self._async.post("/v1/completions", json=body, headers=headers)
        except httpx.HTTPError as error:
            raise self._failure("/v1/completions", error, self._request_timeout_s) from error
        finally:
            was_cut = self._was_cut.pop(request.name, False)
        return self._parse(self._checked("/v1/completions", response), version, was_cut=was_cut)

    async def cut(self, name: str) -> None:
        """Have the completion of this name end, and return what it has so far.

        Raises:
            EngineRequestError: The engine did not take it.
        """
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

    async def report(self) -> EngineReport:
        """Say what the engine is doing, by its own metrics.

        Raises:
            EngineFaultError: It did not answer, or with something that vLLM's metrics are not.
        """
        try:
            response = await self._async.get("/metrics", timeout=_REPORT_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise self._failure("/metrics", error, _REPORT_TIMEOUT_S) from error
        self._check_status("/metrics", response)
        report = parse_metrics(response.text)
        if report is None:
            raise EngineFaultError(f"{self._name} answered /metrics with something that is not vLLM's{self._see_log()}")
        return report

    def post(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        """Call a control route and return its parsed answer.

        Raises:
            EngineRequestError: It failed, or took longer than `timeout_s`.
        """
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
        # Not kept: vLLM's server drops the connection after an error, and the next call would run into that.
        headers = {"Connection": "close"}
        try:
            response = self._sync.post(path, json=body, headers=headers, timeout=timeout)
        except httpx.HTTPError as error:
            raise self._failure(path, error, timeout_s) from error
        return self._checked(path, response)

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
        if not values:
            raise EngineRequestError(f"{self._name} has no {_RUNNING_METRIC} among its metrics{self._see_log()}")
        return round(sum(map(float, values)))

    async def aclose(self) -> None:
        """Close the asynchronous half, in the loop that used it."""
        await self._async.aclose()

    def close(self) -> None:
        """Close the synchronous half."""
        self._sync.close()

    def _checked(self, path: str, response: httpx.Response) -> Any:
        self._check_status(path, response)
        try:
            return response.json()
        except ValueError as error:
            raise EngineFaultError(f"{self._name} answered {path} with something that is not JSON") from error

    def _check_status(self, path: str, response: httpx.Response) -> None:
        status = response.status_code
        if status != httpx.codes.OK:
            # What is wrong with the request (4xx) is wrong everywhere; what is too much here may not be so elsewhere.
            kind = EngineRequestError if 400 <= status < 500 and status not in _OVERLOADED else EngineFaultError
            raise kind(f"{self._name} answered {path} with status {status}: {response.text[:500]}{self._see_log()}")

    def _parse(self, answer: Any, version: int, *, was_cut: bool = False) -> Rollout:
        try:
            (choice,) = answer["choices"]
            token_ids = np.asarray(choice["token_ids"], dtype=np.int32)
            logprobs = np.asarray(choice["logprobs"]["token_logprobs"], dtype=np.float32)
            finish_reason = choice["finish_reason"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise EngineFaultError(f"{self._name} sent a completion without tokens or logprobs: {error!r}") from error
        if was_cut and finish_reason == "abort":
            finish_reason = "cut"
        has_tokens = token_ids.size > 0 or finish_reason == "cut"
        is_whole = token_ids.ndim == 1 and has_tokens and token_ids.shape == logprobs.shape
        if not is_whole or finish_reason not in ("stop", "length", "cut"):
            raise EngineFaultError(
                f"{self._name} sent a malformed completion: {token_ids.size} tokens, {logprobs.size} logprobs, "
                f"finish_reason {finish_reason!r}"
            )
        if not math.isfinite(float(logprobs.sum())):
            raise EngineRequestError(
                f"{self._name} sent a logprob that is not finite: the weights it holds (version {version}) do not "
                "compute. If training diverged, lower learning_rate."
            )
        return Rollout(
            token_ids=token_ids,
            rollout_logprobs=logprobs,
            finish_reason=finish_reason,
            weight_version=version,
            engine=self._name,
        )

    def _failure(self, path: str, error: httpx.HTTPError, timeout_s: float | None = None) -> EngineFaultError:
        what = f"did not answer {path}"
        if isinstance(error, httpx.TimeoutException) and timeout_s is not None:
            what += f" within {timeout_s:g} s"
        return EngineFaultError(f"{self._name} {what}: {type(error).__name__} {error}{self._see_log()}")

    def _see_log(self) -> str:
        return f" (see {self.log_path})" if self.log_path is not None else ""
