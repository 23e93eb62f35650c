"""LoRA adapters that a worker serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def active_adapter(model: nn.Module) -> tuple[int, Any] | None:
    """Return the slot of the one adapter that is in use and vLLM's record of it; None where there is not one."""
    manager: Any = getattr(model, "lora_manager", None)
    if manager is None:
        return None
    active = [(slot, number) for slot, number in enumerate(manager.lora_index_to_id) if number is not None]
    if len(active) != 1:
        return None
    slot, number = active[0]
    adapter = manager.get_adapter(number)
    return None if adapter is None else (slot, adapter)


def activate_adapter(model: nn.Module, adapter: Any) -> bool:
    """Make sure that an adapter which this worker has loaded before is in use.

    Returns:
        Whether it was not; it then has the values that it was loaded with.
    """
    manager: Any = model.lora_manager
    manager.add_adapter(adapter)
    return bool(manager.activate_adapter(adapter.id))


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that vLLM wrapped so that they can have an adapter."""
    manager: Any = model.lora_manager
    return dict(manager.modules)


def adapter_dtype(model: nn.Module) -> torch.dtype:
    """Return the type in which adapters are held."""
    manager: Any = model.lora_manager
    dtype = manager.lora_config.lora_dtype
    assert isinstance(dtype, torch.dtype)  # vLLM resolves "auto" when it starts
    return dtype


def make_adapter(model: nn.Module, tensors: dict[str, torch.Tensor], rank: int) -> Any:
    """Return what vLLM's loading makes of an adapter's tensors up to where they go into the layers' buffers.

    Args:
        model: The model that vLLM serves.
        tensors: By PEFT's names, in the type of `adapter_dtype`, on the meta device.
        rank: Largest of the adapter; its scaling is taken to be 1.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager: Any = model.lora_manager
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        # 0.26 has the latter name.
        mapper = mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper.get_unstacked_mapper()
    adapter = LoRAModel.from_lora_tensors(
        lora_model_id=1,
        tensors=tensors,
        peft_helper=PEFTHelper.from_dict({"r": rank, "lora_alpha": rank, "target_modules": []}),
        device="meta",
        dtype=adapter_dtype(model),
        weights_mapper=mapper,
        skip_prefixes=getattr(model, "lora_skip_prefixes", None),
    )
    manager._create_merged_loras_inplace(adapter)
    return adapter


def put_adapter(model: nn.Module, adapter: Any, slot: int) -> None:
    """Do what vLLM does when it moves an adapter into a slot of the layers' buffers."""
    manager: Any = model.lora_manager
    for name, layer in manager.modules.items():
        weights = manager._get_lora_layer_weights(adapter, name)
        if weights:
            layer.set_lora(slot, weights.lora_a, weights.lora_b)


def adapter_shapes(adapter: Any) -> dict[str, list[tuple[int, ...] | None]]:
    """Return the shapes of an adapter's factors, A before B, for each layer that it changes."""
    return {name: [*_shapes(weights.lora_a), *_shapes(weights.lora_b)] for name, weights in adapter.loras.items()}


def _shapes(factors: Any) -> list[tuple[int, ...] | None]:
    pieces = factors if isinstance(factors, list) else [factors]
    return [None if piece is None else tuple(piece.shape) for piece in pieces]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Give the model, for a while, the layers that it was loaded into, without those that add an adapter to them."""
    from vllm.lora.layers import BaseLayerWithLoRA

    wrappers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseLayerWithLoRA)]
    # Experts that were wrapped look for their weights under other names (0.32), and skip those of a checkpoint.
    renamed: list[Any] = [module for module in model.modules() if vars(module).get("lora_base_layer_prefix")]
    prefixes = [module.lora_base_layer_prefix for module in renamed]

    def put(name: str, layer: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)

    try:
        for name, layer in wrappers:
            put(name, layer.base_layer)
        for module in renamed:
            module.lora_base_layer_prefix = ""
        yield
    finally:
        for module, prefix in zip(renamed, prefixes, strict=True):
            module.lora_base_layer_prefix = prefix
        for name, layer in wrappers:
            put(name, layer)
