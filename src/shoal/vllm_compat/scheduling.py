"""The engine's core: its scheduler, and the outputs that it sends to the front end."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import fields
from typing import Any

# The fields of an output that a step may fill (0.26 to 0.33), apart from its tokens and their logprobs: those that
# come with a request's first or last output or in every one alike, and those that our route hands on to nobody (routed
# experts, masks).
_KNOWN_OUTPUT_FIELDS = frozenset(
    {
        "request_id", "new_token_ids", "new_logprobs", "new_prompt_logprobs_tensors", "pooling_output", "finish_reason",
        "stop_reason", "events", "kv_transfer_params", "ec_transfer_params", "trace_headers", "prefill_stats",
        "routed_experts", "num_nans_in_logits", "mm_cache_miss_hashes", "new_sampling_mask", "spec_decode_metrics",
        "prompt_token_id_logprobs", "error",
    }
)  # fmt: skip


def scheduler_class(config: Any) -> type[Any]:
    """Return the class of scheduler that vLLM would take for this configuration."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    kind: type[Any] = AsyncScheduler if config.scheduler_config.async_scheduling else Scheduler
    return kind


def why_not_hold() -> str | None:
    """Say what is unknown in how this vLLM hands over what a step has written; None if nothing is."""
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.outputs import LogprobsLists

    if unknown := set(EngineCoreOutput.__struct_fields__) - _KNOWN_OUTPUT_FIELDS:
        return f"vLLM's EngineCoreOutput has {', '.join(sorted(unknown))}, which Shoal does not know"
    expected = ("logprob_token_ids", "logprobs", "sampled_token_ranks", "cu_num_generated_tokens")
    if LogprobsLists._fields != expected:
        return f"vLLM's LogprobsLists has the fields {LogprobsLists._fields}, not {expected}"
    return None


def join_logprobs(token_ids: list[int], logprobs: list[float], ranks: list[int]) -> Any:
    """Return the logprobs of sampled tokens as the front end expects them of a core."""
    import numpy as np
    from vllm.v1.outputs import LogprobsLists

    return LogprobsLists(
        np.array(token_ids, dtype=np.int32)[:, None],
        np.array(logprobs, dtype=np.float32)[:, None],
        np.array(ranks, dtype=np.int32),
    )


def empty_message() -> Any:
    """Return a message of an engine's core to its front end."""
    from vllm.v1.engine import EngineCoreOutputs

    return EngineCoreOutputs(outputs=[])


def says_something(message: Any) -> bool:
    """Whether there is anything in such a message of a scheduler."""
    return bool(message.outputs or message.scheduler_stats is not None or message.finished_requests)


def is_told_late(config: Any) -> bool:
    """Whether vLLM's scheduler may learn of a token some steps after it was written, by an engine's configuration.

    The asynchronous one counts the tokens that are on their way (`num_output_placeholders`) and accepts several at
    once, as speculation brings them. What it does not know of must be nowhere needed: vLLM's second runner keeps a
    request's tokens itself, while the first one is sent them again in places, and so are connectors.
    """
    return bool(
        config.scheduler_config.async_scheduling
        and getattr(config, "use_v2_model_runner", False)
        and config.kv_transfer_config is None
        and config.speculative_config is None
        and config.parallel_config.pipeline_parallel_size == 1
    )


def why_not_tell_late() -> str | None:
    """Say what is unknown in how this vLLM's asynchronous scheduler takes tokens in; None if nothing is."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    used = {
        SchedulerOutput: {"num_scheduled_tokens", "total_num_scheduled_tokens", "scheduled_new_reqs"},
        ModelRunnerOutput: {"req_ids", "req_id_to_index", "sampled_token_ids", "logprobs"},
    }
    for kind, names in used.items():
        if missing := names - {field.name for field in fields(kind)}:
            return f"vLLM's {kind.__name__} has no {', '.join(sorted(missing))}"
    method, expected = AsyncScheduler._update_request_with_output, ("self", "request", "new_token_ids")
    if (given := tuple(inspect.signature(method).parameters)[:3]) != expected:
        return f"{method.__name__} takes {given}, not {expected}"
    code = inspect.getsource(Request.__init__)
    for name in ("num_in_flight_tokens", "num_output_placeholders"):
        if f"self.{name}" not in code:
            return f"vLLM's Request has no {name}"
    return None


def stops_of(request: Any) -> frozenset[int] | None:
    """Return the tokens that may end a request, given as the scheduler has it; None if other things may, too."""
    params = request.sampling_params
    if params is None or params.repetition_detection is not None or request.use_structured_output or request.resumable:
        return None
    return frozenset({params.eos_token_id, *(params.stop_token_ids or ())} - {None})


def tokens_left(scheduler: Any, request: Any) -> int:
    """Return after how many more tokens a request ends for its length."""
    by_length: int = request.max_tokens - request.num_output_tokens
    by_context: int = scheduler.max_model_len - request.num_tokens
    return min(by_length, by_context)


def enter(request: Any, token_ids: list[int]) -> None:
    """Enter tokens into a request that do not end it, as the asynchronous scheduler does one by one."""
    request.append_output_token_ids(token_ids)
    request.num_output_placeholders -= len(token_ids)


def has_new(scheduler_output: Any) -> bool:
    """Whether a request begins in a step, or goes on after it was preempted."""
    return bool(scheduler_output.scheduled_new_reqs or scheduler_output.scheduled_cached_reqs.resumed_req_ids)


def writes(request: Any) -> bool:
    """Whether a request that runs has done its prompt, so that a step gives it one token."""
    return bool(request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens == 1)


def is_plain_decode(scheduler_output: Any, model_runner_output: Any) -> bool:
    """Whether a step gave one token to each of its requests, none of which begins, and nothing else."""
    return (
        scheduler_output.total_num_scheduled_tokens == len(scheduler_output.num_scheduled_tokens) > 0
        and not has_new(scheduler_output)
        and not any(getattr(model_runner_output, name) for name in _other_results())
    )


def told_at_once(
    scheduler_output: Any, model_runner_output: Any, tokens: Mapping[str, list[int]], *, is_step: bool
) -> tuple[Any, Any]:
    """Return what tells a scheduler of several steps' tokens of some requests, and of no other request.

    Args:
        scheduler_output: Of the last step.
        model_runner_output: Of the last step.
        tokens: Of each request to be told of.
        is_step: Whether it also tells of the last step, for what is counted by the step.
    """
    counts = {name: len(token_ids) for name, token_ids in tokens.items()}
    # Not `dataclasses.replace`, which goes through all fields: this is done in every step.
    step, results = copy(scheduler_output), copy(model_runner_output)
    step.num_scheduled_tokens = counts
    step.total_num_scheduled_tokens = scheduler_output.total_num_scheduled_tokens if is_step else 0
    results.req_ids = list(tokens)
    results.req_id_to_index = {name: row for row, name in enumerate(tokens)}
    results.sampled_token_ids = list(tokens.values())
    results.logprobs = None
    return step, results


@functools.cache
def _other_results() -> tuple[str, ...]:
    """Name the fields of a step's results that a step may well leave empty."""
    from vllm.v1.outputs import ModelRunnerOutput

    always = {"req_ids", "req_id_to_index", "sampled_token_ids", "logprobs", "cudagraph_stats"}
    return tuple(field.name for field in fields(ModelRunnerOutput) if field.name not in always)


def steady_steps(scheduler: Any) -> Callable[[Any], int] | None:
    """Return what tells in how many of the next steps nothing but one more token becomes of a request that writes.

    That is until it needs a cache block, or ends for its length. None for models with other than full attention, or
    where blocks are freed late.
    """
    try:
        found = None if scheduler.defer_block_free else _full_attention(scheduler)
    except AttributeError:  # `skip_idle_block_work` says so
        return None
    if found is None:
        return None
    _, group = found
    size, blocks_of = group.block_size, group.req_to_blocks

    def steps(request: Any) -> int:
        computed = request.num_computed_tokens
        if request.has_encoder_inputs or request.use_structured_output:
            return 0
        by_blocks: int = size * len(blocks_of[request.request_id]) - computed
        by_length: int = request.num_prompt_tokens + request.max_tokens - 1 - computed
        by_context: int = scheduler.max_model_len - 1 - computed
        return min(by_blocks, by_length, by_context)

    return steps


def is_unpaused(scheduler: Any) -> bool:
    """Whether a scheduler plans steps at all."""
    return bool(scheduler.pause_state.name == "UNPAUSED")


def num_free_blocks(scheduler: Any) -> int:
    """Return how many cache blocks can be given to requests."""
    return int(scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def give_token_each(output: Any, requests: Mapping[str, Any]) -> None:
    """Add steady requests to a step that is planned, and do to each what planning it does."""
    cached = output.scheduled_cached_reqs
    cached.req_ids += requests
    cached.new_block_ids += [None] * len(requests)
    output.num_scheduled_tokens.update(dict.fromkeys(requests, 1))
    output.total_num_scheduled_tokens += len(requests)
    for request in requests.values():
        computed = request.num_computed_tokens
        cached.num_computed_tokens.append(computed)
        cached.num_output_tokens.append(computed + 1 - request.num_prompt_tokens)
        request.num_computed_tokens = computed + 1
        request.num_in_flight_tokens += 1
        request.num_output_placeholders += 1


def skip_idle_block_work(scheduler: Any) -> str | None:
    """Have a scheduler look after a request's cache blocks when it fills one, rather than for each token.

    vLLM (0.26 to 0.33) asks four objects for each request of each step whether it needs a block, and tries to enter
    its full blocks in the prefix cache. Most of the time nothing of it can be due, which two numbers tell. Only for
    models with full attention alone, no speculation and no connector; elsewhere this does nothing.

    Returns:
        What is not as expected in this vLLM, which then goes on as it did; None if nothing is.
    """
    try:
        found = _full_attention(scheduler)
        if found is None:
            return None
        manager, group = found
        size = group.block_size
        allocate, cache = manager.allocate_slots, manager.cache_blocks
        blocks_of, nothing = group.req_to_blocks, manager.empty_kv_cache_blocks
        num_cached_of = group.num_cached_block
    except AttributeError as error:
        return str(error)
    expected = {allocate: ("request", "num_new_tokens"), cache: ("request", "num_computed_tokens")}
    for method, names in expected.items():
        if (given := tuple(inspect.signature(method).parameters)[:2]) != names:
            return f"{method.__name__} takes {given}, not {names}"

    def allocate_slots(request: Any, num_new_tokens: int, **options: Any) -> Any:
        # Running requests are asked for with this option alone, others with more.
        if num_new_tokens == 1 and options.keys() == {"num_lookahead_tokens"}:
            blocks = blocks_of.get(request.request_id)
            if blocks is not None and request.num_computed_tokens < size * len(blocks):
                return nothing
        return allocate(request, num_new_tokens, **options)

    def cache_blocks(request: Any, num_computed_tokens: int) -> None:
        if num_computed_tokens // size > num_cached_of.get(request.request_id, 0):
            cache(request, num_computed_tokens)

    manager.allocate_slots = allocate_slots
    manager.cache_blocks = cache_blocks
    return None


def _full_attention(scheduler: Any) -> tuple[Any, Any] | None:
    """Return a scheduler's managers of cache and blocks, if the model has full attention alone and nothing is unusual.

    Raises:
        AttributeError: This vLLM is not as expected.
    """
    manager = scheduler.kv_cache_manager
    groups = manager.coordinator.single_type_managers
    if scheduler.connector is not None or scheduler.num_lookahead_tokens or len(groups) != 1:
        return None
    (group,) = groups
    if type(group).__name__ != "FullAttentionManager" or manager.block_pool.hash_block_size != group.block_size:
        return None
    return manager, group
