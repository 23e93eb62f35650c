"""Find out what answers at a URL: an engine with Shoal's plugin, a plain vLLM server, or something of no use."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from shoal.errors import ConfigError, EngineStartError
from shoal.vllm_plugin.attach_routes import ABOUT_PATH
from shoal.vllm_plugin.gate import KEY_VARIABLE
from shoal.wire.agreement import own_version

_POLL_S = 0.5
_ANSWER_S = 20.0
_SERVER_INFO_S = 120.0  # vLLM runs half a dozen programs for it, the first time
_NOT_READY = (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT)
_WRONG_KEY = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What a server says of itself.

    Attributes:
        url: Where it was asked.
        request_model: What a completion has to name as its model.
        has_plugin: Whether it was started with Shoal's plugin.
        num_workers: vLLM's worker processes.
        data_parallel_size: vLLM's.
        device: `"cuda"`, `"cpu"`, ...
        dtype: Of its weights, such as `"bfloat16"`.
        max_model_len: Longest prompt with completion, in tokens.
        logprobs_mode: vLLM's.
        generation_config: vLLM's.
        serves_adapters: Whether it was started for LoRA adapters.
        weight_transfer: Backend of vLLM's own weight update; None where it was started without.
        model: The model's configuration as transformers has it; None where the server does not say.
    """

    url: str
    request_model: str
    has_plugin: bool
    num_workers: int
    data_parallel_size: int
    device: str
    dtype: str
    max_model_len: int
    logprobs_mode: str
    generation_config: str
    serves_adapters: bool
    weight_transfer: str | None
    model: Mapping[str, Any] | None


def probe(url: str, api_key: str | None, timeout_s: float) -> ServerFacts:
    """Wait until something answers, and find out what it is.

    Args:
        url: Such as `"http://10.0.0.7:8000"`.
        api_key: Of the server; None for one without.
        timeout_s: For it to become ready.

    Raises:
        EngineStartError: Nothing became ready in time.
        ConfigError: It refuses the key, is no vLLM server, or has no control routes.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=_ANSWER_S, trust_env=False) as client:
        served = _served_model(client, url, timeout_s, has_key=api_key is not None)
        answer = _get(client, ABOUT_PATH)
        if answer is None:
            return _stock_facts(client, url, served)
    if answer["shoal"] != own_version():
        raise ConfigError(
            f"The engine at {url} runs Shoal {answer['shoal']}, and this trainer is {own_version()}: the two must "
            "agree on how weights travel. Install the same version on both sides."
        )
    facts = {name: value for name, value in answer.items() if name != "shoal"}
    return ServerFacts(url=url, request_model=served, has_plugin=True, **facts)


def _served_model(client: httpx.Client, url: str, timeout_s: float, *, has_key: bool) -> str:
    """Wait for the list of models; return the first one's name."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            answer = client.get("/v1/models")
            said = f"it answers with status {answer.status_code}"
            is_ready = answer.status_code not in _NOT_READY
        except httpx.TransportError as error:
            said, is_ready = f"{type(error).__name__}: {error}", False
        except httpx.InvalidURL as error:
            raise ConfigError(f"{url!r} in vllm_server_base_urls is no URL: {error}") from None
        if is_ready:
            break
        if time.monotonic() > deadline:
            raise EngineStartError(
                f"Nothing became ready at {url} within {timeout_s:g} s ({said}). Start the engine (`shoal serve`), "
                "look whether this host reaches it, or raise vllm_startup_timeout_s."
            )
        time.sleep(_POLL_S)
    if answer.status_code in _WRONG_KEY:
        fault = "refuses the key that it was given" if has_key else "needs a key, and none is given"
        raise ConfigError(
            f"The engine at {url} {fault}. Set {KEY_VARIABLE} or vllm_api_key_file to what it was started with."
        )
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, KeyError, TypeError, IndexError):
        raise ConfigError(
            f"What answers at {url} is no vLLM server: /v1/models gives status {answer.status_code} and no list of "
            "models (TRL's own `trl vllm-serve` is none either). Start an engine with `shoal serve`."
        ) from None


def _stock_facts(client: httpx.Client, url: str, served: str) -> ServerFacts:
    """Ask a vLLM server without Shoal's plugin."""
    size = _get(client, "/get_world_size?include_dp=false")
    info = _get(client, "/server_info?config_format=json")
    if size is None or info is None:
        raise ConfigError(
            f"The vLLM server at {url} has no control routes, so no weights can be sent to it: it was started without "
            "VLLM_SERVER_DEV_MODE=1. Start it with `shoal serve`, or with that variable, "
            '--weight-transfer-config \'{"backend": "nccl"}\', --logprobs-mode processed_logprobs and '
            "--generation-config vllm."
        )
    try:
        config = info["vllm_config"]
        model, device = config["model_config"], config["device_config"]
        return ServerFacts(
            url=url,
            request_model=served,
            has_plugin=False,
            num_workers=int(size["world_size"]),
            data_parallel_size=int(config["parallel_config"]["data_parallel_size"]),
            device=str(device.get("device_type") or device["device"]).partition(":")[0],
            dtype=str(model["dtype"]).removeprefix("torch."),
            max_model_len=int(model["max_model_len"]),
            logprobs_mode=str(model["logprobs_mode"]),
            generation_config=str(model["generation_config"]),
            serves_adapters=config["lora_config"] is not None,
            weight_transfer=(config["weight_transfer_config"] or {}).get("backend"),
            model=None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"The vLLM server at {url} describes itself in a way that Shoal does not know ({error!r}). Start it with "
            "`shoal serve`, with a vLLM that Shoal supports."
        ) from None


def _get(client: httpx.Client, path: str) -> Any:
    """Return a route's parsed answer; None where the server has no such route.

    Raises:
        EngineStartError: It failed.
    """
    try:
        answer = client.get(path, timeout=_SERVER_INFO_S)
        if answer.status_code in (httpx.codes.NOT_FOUND, httpx.codes.METHOD_NOT_ALLOWED):
            return None
        return answer.raise_for_status().json()
    except (httpx.HTTPError, ValueError) as error:
        raise EngineStartError(f"{client.base_url} did not answer {path}: {type(error).__name__} {error}") from error
