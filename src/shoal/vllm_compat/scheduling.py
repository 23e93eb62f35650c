"""The engine's core: its scheduler, and the outputs that it sends to the front end."""

from __future__ import annotations

import inspect
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


def skip_idle_block_work(scheduler: Any) -> str | None:
    """Have a scheduler look after a request's cache blocks when it fills one, rather than for each token.

    vLLM (0.26 to 0.33) asks four objects for each request of each step whether it needs a block, and tries to enter
    its full blocks in the prefix cache. Most of the time nothing of it can be due, which two numbers tell. Only for
    models with full attention alone, no speculation and no connector; elsewhere this does nothing.

    Returns:
        What is not as expected in this vLLM, which then goes on as it did; None if nothing is.
    """
    try:
        manager = scheduler.kv_cache_manager
        groups = manager.coordinator.single_type_managers
        if scheduler.connector is not None or scheduler.num_lookahead_tokens or len(groups) != 1:
            return None
        (group,) = groups
        size = group.block_size
        if type(group).__name__ != "FullAttentionManager" or manager.block_pool.hash_block_size != size:
            return None
        allocate, cache = manager.allocate_slots, manager.cache_blocks
        blocks_of, nothing = group.req_to_blocks, manager.empty_kv_cache_blocks
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
        if num_computed_tokens % size == 0:
            cache(request, num_computed_tokens)

    manager.allocate_slots = allocate_slots
    manager.cache_blocks = cache_blocks
    return None
