"""The server process: the client of the engine that vLLM's routes have, and what it is asked."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias


async def pause(engine: Any) -> None:
    """Have an engine, given as the server's client of it, stop before its next step; requests keep their place."""
    await engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)


async def resume(engine: Any) -> None:
    """Let an engine go on that was paused; one that was not is left as it is."""
    await engine.engine_core.resume_scheduler_async()


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a completion that follow those before; `finish_reason` is vLLM's word with the last ones."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str | None


Pieces: TypeAlias = AsyncIterator[Piece]


# In a request's `extra_args`: its outputs may reach the front end later and several at once.
_MAY_HOLD = "shoal_may_hold"


def sampling_params(sampling: Mapping[str, Any], *, seed: int, flush_tokens: int, is_held: bool = False) -> Any:
    """Return vLLM's sampling parameters for one completion of which nothing but ids and logprobs is wanted.

    Args:
        sampling: By vLLM's names.
        seed: Of this completion.
        flush_tokens: Tokens to be handed over together; 0 for all of them at the end, as it is in releases that have
            no interval of a single request unless the engine holds them.
        is_held: Whether the engine's scheduler is ours and hands over many steps at once.

    Raises:
        Exception: vLLM does not take them, see `is_refusal`.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    fields = SamplingParams.__struct_fields__
    # One list of floats instead of a dictionary with an object for each token.
    options: dict[str, Any] = {"flat_logprobs": True} if "flat_logprobs" in fields else {}
    if is_held:
        options["extra_args"] = {_MAY_HOLD: True}
    options["output_kind"] = RequestOutputKind.FINAL_ONLY
    if flush_tokens and "stream_interval" in fields:
        options |= {"stream_interval": flush_tokens, "output_kind": RequestOutputKind.DELTA}
    elif flush_tokens and is_held:
        options["output_kind"] = RequestOutputKind.DELTA
    options |= sampling
    options["stop_token_ids"] = list(sampling.get("stop_token_ids", ()))  # 0.26 refuses any other sequence
    return SamplingParams(n=1, seed=seed, logprobs=0, detokenize=False, **options)


async def write(engine: Any, token_ids: list[int], params: Any, *, name: str, adapter: Any, cache_salt: str) -> Pieces:
    """Have an engine, given as the server's client of it, write one completion. Closing the iterator aborts it."""
    prompt: dict[str, Any] = {"prompt_token_ids": token_ids}
    if cache_salt:
        prompt["cache_salt"] = cache_salt
    if _takes_rendered_prompts():
        prompt["type"] = "token"
    outputs = engine.generate(prompt, params, name, lora_request=adapter)
    async with aclosing(outputs):
        async for output in outputs:
            (completion,) = output.outputs
            yield Piece(completion.token_ids, _sampled_logprobs(completion), completion.finish_reason)


def adapter_request(state: Any, model: str) -> Any:
    """Return how to ask the engine of a server for a served model: its adapter of this name, or None for the base.

    Raises:
        ValueError: The server serves no such model.
    """
    models = state.openai_serving_models
    if model in models.lora_requests:
        return models.lora_requests[model]
    if not models.is_base_model(model):
        raise ValueError(f"no model {model!r} is served here")
    return None


def is_refusal(error: Exception) -> bool:
    """Whether it is the request that is wrong, rather than the engine."""
    import vllm.exceptions

    return isinstance(error, (ValueError, getattr(vllm.exceptions, "VLLMClientError", ValueError)))


@functools.cache
def _takes_rendered_prompts() -> bool:
    """Whether prompts that are token ids may skip vLLM's rendering of prompts (0.32 warns that they must)."""
    try:
        from vllm.inputs.engine import TokensInput
    except ImportError:
        return False
    return "type" in TokensInput.__annotations__


def _sampled_logprobs(completion: Any) -> Sequence[float]:
    values = completion.logprobs
    if hasattr(values, "start_indices"):
        return [values.logprobs[place] for place in values.start_indices]
    return [entry[token].logprob for token, entry in zip(completion.token_ids, values or (), strict=True)]


def describe(engine: Any) -> dict[str, Any]:
    """Return what a trainer must know of an engine, given as the server's client of it, before it sends weights."""
    config = engine.vllm_config
    return {
        "num_workers": config.parallel_config.world_size,
        "data_parallel_size": config.parallel_config.data_parallel_size,
        "device": config.device_config.device_type,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "max_model_len": config.model_config.max_model_len,
        "logprobs_mode": config.model_config.logprobs_mode,
        "generation_config": config.model_config.generation_config,
        "serves_adapters": config.lora_config is not None,
        "weight_transfer": getattr(config.weight_transfer_config, "backend", None),
        "model": config.model_config.hf_config.to_dict(),
    }


def scheduler_name(engine: Any) -> object:
    """Return what `--scheduler-cls` named for an engine, given as the server's client of it."""
    return engine.vllm_config.scheduler_config.scheduler_cls


def may_hold(request: Any) -> bool:
    """Whether the outputs of a request, given as the scheduler has it, may reach the front end several at once."""
    extra = getattr(request.sampling_params, "extra_args", None)
    return bool(extra and extra.get(_MAY_HOLD))
