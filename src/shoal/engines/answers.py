"""Turn what an engine sends for a completion into a `Rollout`, or into the error that says what is wrong with it.

What arrives may be anything: a broken engine, another service on its port, a proxy. Only `EngineRequestError` and its
subclass `EngineFaultError` leave this module.
"""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from shoal.errors import EngineFaultError, EngineRequestError
from shoal.types import Rollout

_MOST_ERROR_BYTES = 4096
MOST_METRICS_BYTES = 16 << 20
MOST_CONTROL_BYTES = 1 << 30  # slice plans and digests of all workers: some MB for large models
_JSON_BYTES_PER_TOKEN = 4096  # 94 as vLLM writes it; a token's text may be long
_JSON_BYTES = 1 << 20


class TooLongError(ValueError):
    """More came than can be right."""


def most_json_bytes(max_tokens: int, prompt_tokens: int) -> int:
    """Return how long the JSON of a completion may be."""
    return _JSON_BYTES + _JSON_BYTES_PER_TOKEN * (max_tokens + prompt_tokens)


async def read_bounded(response: httpx.Response, most_bytes: int) -> bytes:
    """Read the body of a response that is being streamed.

    Raises:
        TooLongError: It is longer than `most_bytes`.
    """
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > most_bytes:
            raise TooLongError(f"more than the {most_bytes} bytes that it may have")
    return bytes(body)


def read_bounded_now(response: httpx.Response, most_bytes: int) -> bytes:
    """Read the body of a response that is being streamed, without an event loop.

    Raises:
        TooLongError: It is longer than `most_bytes`.
    """
    body = bytearray()
    for piece in response.iter_bytes():
        body += piece
        if len(body) > most_bytes:
            raise TooLongError(f"more than the {most_bytes} bytes that it may have")
    return bytes(body)


async def read_error(response: httpx.Response) -> str:
    """Return the beginning of what an engine says of an error."""
    body = bytearray()
    async for piece in response.aiter_bytes(_MOST_ERROR_BYTES):
        body += piece
        if len(body) >= _MOST_ERROR_BYTES:
            break
    return bytes(body[:_MOST_ERROR_BYTES]).decode(errors="replace")


def parse_json(engine: str, path: str, body: bytes) -> Any:
    """Return what the body says.

    Raises:
        EngineFaultError: It is no JSON.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise EngineFaultError(f"{engine} answered {path} with something that is not JSON") from error


def parse_completion(engine: str, answer: Any, *, version: int, was_cut: bool) -> Rollout:
    """Return the completion in what `/v1/completions` answered.

    Args:
        engine: Name of the engine.
        answer: The parsed JSON.
        version: Of the weights that wrote it.
        was_cut: Whether the engine was told to end it.

    Raises:
        EngineFaultError: It has no completion, or not one that fits together.
        EngineRequestError: Its logprobs are not finite.
    """
    try:
        (choice,) = answer["choices"]
        token_ids = _token_ids(choice["token_ids"])
        logprobs = np.asarray(choice["logprobs"]["token_logprobs"], dtype=np.float32)
        finish_reason = choice["finish_reason"]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise EngineFaultError(f"{engine} sent a completion without tokens or logprobs: {error!r}") from error
    return checked_rollout(engine, token_ids, logprobs, finish_reason, version=version, was_cut=was_cut)


def checked_rollout(
    engine: str,
    token_ids: npt.NDArray[np.int32],
    logprobs: npt.NDArray[np.float32],
    finish_reason: object,
    *,
    version: int,
    was_cut: bool,
) -> Rollout:
    """Return the rollout, once it is certain that it is one.

    Raises:
        EngineFaultError: Its parts do not fit together.
        EngineRequestError: Its logprobs are not finite.
    """
    if was_cut and finish_reason == "abort":
        finish_reason = "cut"
    has_tokens = token_ids.size > 0 or finish_reason == "cut"
    is_whole = token_ids.ndim == 1 and has_tokens and token_ids.shape == logprobs.shape
    if not is_whole or finish_reason not in ("stop", "length", "cut"):
        raise EngineFaultError(
            f"{engine} sent a malformed completion: {token_ids.size} tokens, {logprobs.size} logprobs, "
            f"finish_reason {finish_reason!r:.80}"
        )
    if not math.isfinite(float(logprobs.sum())):
        raise EngineRequestError(
            f"{engine} sent a logprob that is not finite: the weights it holds (version {version}) do not "
            "compute. If training diverged, lower learning_rate."
        )
    return Rollout(
        token_ids=token_ids,
        rollout_logprobs=logprobs,
        finish_reason=finish_reason,  # type: ignore[arg-type]  # one of the three, see above
        weight_version=version,
        engine=engine,
    )


def _token_ids(value: Any) -> npt.NDArray[np.int32]:
    """Return token ids as an array.

    Raises:
        TypeError, ValueError, OverflowError: They are not token ids.
    """
    token_ids = np.asarray(value, dtype=np.int32)
    if token_ids.size and (token_ids.min() < 0 or np.asarray(value).dtype.kind != "i"):
        raise ValueError("token ids that are not whole numbers from 0 on")
    return token_ids
