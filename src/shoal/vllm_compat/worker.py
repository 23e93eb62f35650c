"""A worker process: what it holds."""

from __future__ import annotations

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
