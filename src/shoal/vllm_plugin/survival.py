"""What of a worker's model nothing would bring back once vLLM has dropped the memory that it was loaded into.

vLLM's sleep at level 2 drops it, saves the model's buffers, and leaves the parameters to the next publish, whose plan
covers every one of them. What is left are tensors that hang elsewhere: in a layer's plain attributes, in the objects
that its kernels are called through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_MODULE_TABLES = ("_parameters", "_buffers", "_modules")


def lost_asleep(model: nn.Module, is_dropped: Callable[[torch.Tensor], bool]) -> list[str]:
    """Name the tensors of a model that are neither parameters nor buffers, and lie where memory is dropped.

    Args:
        model: The worker's.
        is_dropped: Whether a tensor's memory is dropped.
    """
    restored = {_storage(value) for value in (*model.parameters(), *model.buffers())}
    seen: set[int] = set()
    return [
        f"{prefix}.{path}" if prefix else path
        for prefix, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in _MODULE_TABLES
        for path, tensor in _tensors(value, attribute, seen)
        if tensor.numel() and tensor.device.type != "meta"
        if _storage(tensor) not in restored and is_dropped(tensor)
    ]


def _tensors(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in an attribute that were not seen before: itself, in containers, and in vLLM's own objects."""
    waiting = [(path, value)]
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen or isinstance(value, nn.Module):
            continue
        parts: list[tuple[Any, Any]] = []
        if isinstance(value, torch.Tensor):
            yield path, value
        elif isinstance(value, list | tuple):
            parts = list(enumerate(value))
        elif isinstance(value, dict):
            parts = list(value.items())
        elif type(value).__module__.startswith("vllm.") and hasattr(value, "__dict__"):
            parts = list(vars(value).items())
        else:
            continue
        seen.add(id(value))
        waiting += [(f"{path}.{name}", part) for name, part in parts]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
