"""What is asked of `POST /shoal/generate`: samples of a few prompts, as JSON.

    {"model": "policy", "salt": "7f", "flush_tokens": 64, "prompts": [[5, 6, 7]],
     "samples": [{"prompt": 0, "name": "a-1", "seed": 3, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
                  "max_tokens": 9, "stop_token_ids": [2]}]}

Samples of one prompt name it by its place, so it is sent once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.types import RolloutRequest

PATH = "/shoal/generate"
MOST_SAMPLES = 1024
_LARGEST_TOKEN = 2**31 - 1


class OrderError(ValueError):
    """A body that is not an order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrder:
    """One completion that is wanted.

    Attributes:
        prompt_token_ids: The prompt.
        name: By which it can be aborted.
        seed: Its own.
        sampling: How to sample, by vLLM's names.
    """

    prompt_token_ids: list[int]
    name: str
    seed: int
    sampling: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Completions that are asked for at once.

    Attributes:
        model: The model or adapter, by its served name.
        salt: Of the prefix cache; empty for none.
        flush_tokens: Tokens of a sample that are sent on together; 0 for all at its end.
        samples: At least one.
    """

    model: str
    salt: str
    flush_tokens: int
    samples: tuple[SampleOrder, ...]


def order_body(requests: Sequence[RolloutRequest], *, model: str, salt: str, flush_tokens: int) -> bytes:
    """Return what to send for these requests. Each has a name of its own."""
    places: dict[tuple[int, ...], int] = {}
    samples = [
        {
            "prompt": places.setdefault(request.prompt_token_ids, len(places)),
            "name": request.name,
            "seed": request.seed,
            **asdict(request.sampling),
        }
        for request in requests
    ]
    order = {"model": model, "salt": salt, "flush_tokens": flush_tokens, "prompts": list(places), "samples": samples}
    return json.dumps(order, separators=(",", ":")).encode()


def parse_order(body: bytes) -> Order:
    """Return what `order_body` wrote.

    Raises:
        OrderError: It did not.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise OrderError(f"the body is not JSON: {error}") from error
    order = _entries(data, "the order", _ORDER)
    prompts = [_token_ids(prompt, f"prompt {place}") for place, prompt in enumerate(order["prompts"])]
    if not 1 <= len(order["samples"]) <= MOST_SAMPLES:
        raise OrderError(f"{len(order['samples'])} samples. Ask for 1 to {MOST_SAMPLES} at once.")
    samples = tuple(_sample(entry, place, prompts) for place, entry in enumerate(order["samples"]))
    if len({sample.name for sample in samples}) != len(samples):
        raise OrderError("two samples have the same name")
    return Order(model=order["model"], salt=order["salt"], flush_tokens=order["flush_tokens"], samples=samples)


def _sample(entry: Any, place: int, prompts: Sequence[list[int]]) -> SampleOrder:
    what = f"sample {place}"
    values = _entries(entry, what, _SAMPLE)
    if values["prompt"] >= len(prompts):
        raise OrderError(f"{what} is of prompt {values['prompt']}, of {len(prompts)}")
    sampling = {name: values[name] for name in _SAMPLING}
    if sampling["stop_token_ids"]:
        _token_ids(sampling["stop_token_ids"], f"the stop tokens of {what}")
    # With no tokens that end a completion, the tokenizer's own does not either.
    sampling["ignore_eos"] = not sampling["stop_token_ids"]
    return SampleOrder(
        prompt_token_ids=prompts[values["prompt"]], name=values["name"], seed=values["seed"], sampling=sampling
    )


def _entries(data: Any, what: str, checks: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    """Check that an object has these entries, of these kinds, and no others."""
    if not isinstance(data, dict) or data.keys() != checks.keys():
        raise OrderError(f"{what} is not an object with the entries {', '.join(sorted(checks))} and no others")
    for name, is_good in checks.items():
        if not is_good(data[name]):
            raise OrderError(f"{name}={str(data[name])[:80]} of {what} is no such thing")
    return data


def _token_ids(value: Any, what: str) -> list[int]:
    if not isinstance(value, list) or not value or set(map(type, value)) != {int}:
        raise OrderError(f"{what} is not a list of token ids")
    if not 0 <= min(value) <= max(value) <= _LARGEST_TOKEN:
        raise OrderError(f"{what} has a token id below 0 or above {_LARGEST_TOKEN}")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 256


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_positive(value: Any) -> bool:
    return _is_count(value) and 0 < value <= _LARGEST_TOKEN


def _is_from_zero(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


_ORDER = {"model": _is_text, "salt": _is_text, "flush_tokens": _is_count, "prompts": _is_list, "samples": _is_list}
_SAMPLING = {
    "temperature": _is_from_zero,
    "top_k": _is_count,
    "top_p": _is_from_zero,
    "min_p": _is_from_zero,
    "max_tokens": _is_positive,
    "stop_token_ids": _is_list,
}
_SAMPLE = {"prompt": _is_count, "name": _is_name, "seed": _is_count, **_SAMPLING}
