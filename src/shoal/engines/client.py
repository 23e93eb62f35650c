"""Talk to one vLLM server over HTTP: ask for completions, and drive the routes that control it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from shoal.engines.command import SERVED_MODEL_NAME
from shoal.errors import EngineRequestError
from shoal.types import UNPROVEN, Rollout, RolloutRequest

_CONNECT_TIMEOUT_S = 10.0
# vLLM closes a connection after 5 idle seconds. Both sides keeping it that long, as is httpx's default too, would now
# and then send a request into a connection that is being closed.
_KEEP_ALIVE_S = 2.0


class EngineClient:
    """A `RolloutEngine` that is a vLLM server.

    The asynchronous half (`generate`) belongs to one event loop; the synchronous half may be called from any thread.

    Args:
        name: For messages and metrics.
        url: Such as `"http://127.0.0.1:8000"`.
        api_key: The run's key.
        log_path: Named in errors; None for a server that somebody else started.
        request_timeout_s: Longest that one completion may take.
    """

    def __init__(self, *, name: str, url: str, api_key: str, log_path: Path | None, request_timeout_s: float) -> None:
        self._name = name
        self._request_timeout_s = request_timeout_s
        self.url = url
        self.log_path = log_path
        self.weight_version = UNPROVEN
        """Version of the weights that this engine was last proven to hold."""
        headers = {"Authorization": f"Bearer {api_key}"}
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
            EngineRequestError: The engine failed, took too long, or answered with something malformed.
        """
        version = self.weight_version
        body = {
            "model": SERVED_MODEL_NAME,
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
        try:
            response = await self._async.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            raise self._failure("/v1/completions", error, self._request_timeout_s) from error
        return self._parse(self._checked("/v1/completions", response), version)

    def post(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        """Call a control route and return its parsed answer.

        Raises:
            EngineRequestError: It failed, or took longer than `timeout_s`.
        """
        try:
            response = self._sync.post(path, json=body, timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S))
        except httpx.HTTPError as error:
            raise self._failure(path, error, timeout_s) from error
        return self._checked(path, response)

    def is_healthy(self) -> bool:
        """Whether the server answers `/health` with 200."""
        try:
            return self._sync.get("/health", timeout=2.0).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    async def aclose(self) -> None:
        """Close the asynchronous half, in the loop that used it."""
        await self._async.aclose()

    def close(self) -> None:
        """Close the synchronous half."""
        self._sync.close()

    def _checked(self, path: str, response: httpx.Response) -> Any:
        if response.status_code != httpx.codes.OK:
            raise EngineRequestError(
                f"{self._name} answered {path} with status {response.status_code}: {response.text[:500]}"
                f"{self._see_log()}"
            )
        try:
            return response.json()
        except ValueError as error:
            raise EngineRequestError(f"{self._name} answered {path} with something that is not JSON") from error

    def _parse(self, answer: Any, version: int) -> Rollout:
        try:
            (choice,) = answer["choices"]
            token_ids = np.asarray(choice["token_ids"], dtype=np.int32)
            logprobs = np.asarray(choice["logprobs"]["token_logprobs"], dtype=np.float32)
            finish_reason = choice["finish_reason"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise EngineRequestError(f"{self._name} sent a completion without tokens or logprobs: {error!r}") from error
        is_whole = token_ids.ndim == 1 and token_ids.size > 0 and token_ids.shape == logprobs.shape
        if not is_whole or finish_reason not in ("stop", "length"):
            raise EngineRequestError(
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

    def _failure(self, path: str, error: httpx.HTTPError, timeout_s: float | None = None) -> EngineRequestError:
        what = f"did not answer {path}"
        if isinstance(error, httpx.TimeoutException) and timeout_s is not None:
            what += f" within {timeout_s:g} s"
        return EngineRequestError(f"{self._name} {what}: {type(error).__name__} {error}{self._see_log()}")

    def _see_log(self) -> str:
        return f" (see {self.log_path})" if self.log_path is not None else ""
