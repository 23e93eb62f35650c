"""A worker process: what it holds."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


def worker_model(worker: Any) -> nn.Module:
    """Return the part of the model that a vLLM worker holds."""
    model = worker.model_runner.get_model()
    assert isinstance(model, nn.Module)
    return model


def worker_device(worker: Any) -> torch.device:
    """Return where a vLLM worker's part of the model lies."""
    return torch.device(worker.device)


def worker_number(worker: Any) -> int:
    """Return a vLLM worker's number among all workers of its engine."""
    parallel = worker.parallel_config
    return int(parallel.data_parallel_index * parallel.world_size + worker.rank)


def worker_context(worker: Any) -> AbstractContextManager[Any]:
    """Return what must be entered around calls of vLLM's layers in a worker."""
    from vllm.config import set_current_vllm_config

    context: AbstractContextManager[Any] = set_current_vllm_config(worker.vllm_config)
    return context


def drops_asleep(tensor: torch.Tensor) -> bool:
    """Whether sleep at level 2 drops this tensor's memory: it lies in what vLLM loaded the model into."""
    if tensor.device.type != "cuda":
        return False
    from vllm.device_allocator.cumem import CuMemAllocator

    address = tensor.untyped_storage().data_ptr()
    return any(
        start <= address < start + data.handle[1]
        for start, data in CuMemAllocator.get_instance().pointer_to_data.items()
        if data.tag == "weights"
    )


def skip_idle_sampler_work() -> str | None:
    """Have vLLM's second runner copy sampling parameters to the GPU in steps with a new request, not in every one.

    vLLM (0.26 to 0.33) copies fifteen arrays before each step (temperatures, seeds, penalties, biases), which change
    when a request comes and at no other time. Where somebody's own logits processors are to be told of each step, all
    goes on as it did.

    Returns:
        What is not as expected in this vLLM, which then goes on as it did; None if nothing is.
    """
    try:
        from vllm.v1.worker.gpu.sample.sampler import Sampler
    except ImportError as error:
        return str(error)
    add, apply = getattr(Sampler, "add_request", None), getattr(Sampler, "apply_staged_writes", None)
    if add is None or apply is None or list(inspect.signature(apply).parameters) != ["self"]:
        return "vLLM's Sampler has no add_request or apply_staged_writes"

    @functools.wraps(add)
    def add_request(self: Any, *args: Any, **options: Any) -> Any:
        self._shoal_has_new = True
        return add(self, *args, **options)

    @functools.wraps(apply)
    def apply_staged_writes(self: Any) -> None:
        if self._shoal_has_new or not _are_vllms(getattr(self, "logits_processors", ())):
            self._shoal_has_new = False
            apply(self)

    if not hasattr(Sampler, "_shoal_has_new"):
        Sampler._shoal_has_new = True
        Sampler.add_request, Sampler.apply_staged_writes = add_request, apply_staged_writes
    return None


def _are_vllms(processors: Iterable[Any]) -> bool:
    return all(type(processor).__module__.startswith("vllm.") for processor in processors)
