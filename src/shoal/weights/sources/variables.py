"""Every parameter of a model in memory, under the name that transformers gives it, whatever is wrapped around it."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from shoal.errors import ConfigError
from shoal.weights.sources.lora import MergedTensor, adapters_of, check_mergeable, has_bias, uses_variant
from shoal.weights.sources.quantised import DequantisedTensor, check_whole, is_quantised
from shoal.weights.sources.shards import Value, address_of, value_of

# Modules that only wrap another one, with their class's name (torch exports not all of them) and where that one is.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "CheckpointWrapper": "_checkpoint_wrapped_module"}


@dataclass(frozen=True, slots=True)
class _Found:
    """A parameter or buffer where the walk came upon it.

    Attributes:
        name: That transformers gives it.
        module: That it belongs to.
        local: Its name there.
        tensor: Itself.
        layers: That adapt it, the innermost first.
    """

    name: str
    module: nn.Module
    local: str
    tensor: torch.Tensor
    layers: tuple[Any, ...]


def core_model(model: nn.Module) -> nn.Module:
    """Return the model of transformers inside of DDP, DeepSpeed's engine, `torch.compile` and PEFT.

    Raises:
        ConfigError: It is wrapped by FSDP1, or its adapters are no LoRA.
    """
    model = unwrapped(model)
    while hasattr(model, "peft_config") and hasattr(model, "base_model") and hasattr(model, "get_base_model"):
        _check_adapters(model)
        get_base_model: Any = model.get_base_model
        model = unwrapped(get_base_model())
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ConfigError(
            "the model is sharded by FSDP1 (FullyShardedDataParallel), whose flat parameters cannot be sent. Use FSDP2 "
            "(fsdp_version: 2 in the accelerate configuration)."
        )
    return model


def unwrapped(model: Any) -> Any:
    """Return the model inside of DDP, DeepSpeed's engine and `torch.compile`."""
    while True:
        if inner := _WRAPPERS.get(type(model).__name__):
            model = getattr(model, inner)
        elif isinstance(model, (DistributedDataParallel, DataParallel)) or type(model).__name__ == "DeepSpeedEngine":
            model = model.module
        else:
            return model


class Variables:
    """Every parameter and persistent buffer of a model that `save_pretrained` would save, tied ones once.

    Going through all of a model costs milliseconds, so it is done again only where something has changed hands.

    Args:
        core: What `core_model` returned.
        wire_dtype: Type of what is computed for sending; see `make_source`.
        merges: Whether adapters are merged, or left out.
    """

    def __init__(self, core: nn.Module, wire_dtype: torch.dtype | None, *, merges: bool = True) -> None:
        self._core = core
        self._wire_dtype = wire_dtype
        self._base_dtype = _base_dtype(core)
        self._merges = merges
        self._found: list[_Found] = []
        self._values: dict[str, tuple[int, Value]] = {}
        self._tables: list[tuple[Mapping[str, Any], tuple[Any, ...]]] = []
        self._wrappers: list[tuple[Any, tuple[Any, ...]]] = []
        self._sharded: list[FSDPModule] = []

    def values(self) -> dict[str, Value]:
        """Return them by the names that transformers gives them.

        Raises:
            ConfigError: One of them cannot be sent.
        """
        for module in self._sharded:
            # After a forward pass without a backward pass FSDP2 leaves some parameters gathered.
            module.reshard()
        if not self._found or not self._is_current():
            self._look()
        return {item.name: self._known_value(item) for item in self._found}

    def _look(self) -> None:
        """Go through the model."""
        self._values.clear()
        self._sharded = [module for module in self._core.modules() if isinstance(module, FSDPModule)]
        for module in self._sharded:
            module.reshard()
        self._wrappers = []
        found = {item.name: item for item in self._walk(self._core, "")}
        ties: Mapping[str, str] = getattr(self._core, "all_tied_weights_keys", None) or {}
        dropped = _tied_names(found, ties) | set(getattr(self._core, "_keys_to_ignore_on_save", None) or ())
        self._found = [item for name, item in found.items() if name not in dropped]
        tables = [
            table for module in self._core.modules() for table in (module._parameters, module._buffers, module._modules)
        ]
        self._tables = [(table, (*table, *table.values())) for table in tables]

    def _is_current(self) -> bool:
        """Whether every module still has the same parameters, buffers and modules, and every adapter its state."""
        return all(
            2 * len(table) == len(items) and all(map(operator.is_, (*table, *table.values()), items))
            for table, items in self._tables
        ) and all(_adapter_state(wrapper) == state for wrapper, state in self._wrappers)

    def _walk(self, module: Any, prefix: str) -> Iterator[_Found]:
        layers: list[Any] = []
        while True:
            if inner := _WRAPPERS.get(type(module).__name__):
                module = getattr(module, inner)
            elif hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
                self._wrappers.append((module, _adapter_state(module)))
                # PEFT computes with the first active adapter's copy.
                trained = [name for name in module.active_adapters if name in module.modules_to_save]
                module = module.modules_to_save[trained[0]] if trained else module.original_module
            elif hasattr(module, "base_layer"):
                if self._merges:
                    check_mergeable(prefix, module)
                    self._wrappers.append((module, _adapter_state(module)))
                    layers.insert(0, module)
                module = module.base_layer
            else:
                break
        for local, tensor in _own_tensors(module):
            adapting = [layer for layer in layers if not layer.merged and adapters_of(layer) and _adapts(layer, local)]
            yield _Found(f"{prefix}.{local}" if prefix else local, module, local, tensor, tuple(adapting))
        for local, child in module._modules.items():
            if child is not None:
                yield from self._walk(child, f"{prefix}.{local}" if prefix else local)

    def _known_value(self, item: _Found) -> Value:
        """Return the value of the last time if the parameter lies where it lay then."""
        address = -1 if item.layers else address_of(item.tensor)
        known = self._values.get(item.name)
        if known is not None and known[0] == address:
            return known[1]
        value = self._value(item)
        if address > 0 and value.is_in_place:
            self._values[item.name] = address, value
        return value

    def _value(self, item: _Found) -> Value:
        base: Value
        check_whole(item.name, item.local, item.module, item.tensor)
        if is_quantised(item.tensor):
            base = DequantisedTensor(
                item.name, item.module, item.tensor, dtype=self._wire_dtype, base_dtype=self._base_dtype
            )
        elif type(item.tensor).__module__.startswith("torchao"):
            raise ConfigError(
                f"{item.name} is quantised by torchao ({type(item.tensor).__name__}), which cannot be sent. Quantise "
                "the base with bitsandbytes (BitsAndBytesConfig), or not at all."
            )
        else:
            base = value_of(item.name, item.tensor)
        return MergedTensor(base, list(item.layers), item.local, self._wire_dtype) if item.layers else base


def _adapter_state(wrapper: Any) -> tuple[Any, ...]:
    """Return what decides which of a wrapper's adapters count, and how."""
    variants = getattr(wrapper, "lora_variant", ())
    return (tuple(wrapper.active_adapters), getattr(wrapper, "merged", False), len(variants))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    # `items`, since DeepSpeed gathers what is asked for by key.
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _adapts(layer: Any, local: str) -> bool:
    return local == getattr(layer, "parameter_name", "weight") or (local == "bias" and has_bias(layer))


def _tied_names(found: Mapping[str, _Found], ties: Mapping[str, str]) -> set[str]:
    """Return the names to leave out, since the same tensor is sent under another.

    Raises:
        ConfigError: An adapter gives tied parameters different values, which engines cannot hold.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    first: dict[int, str] = {}
    for name, item in found.items():
        main = ties.get(name)
        first_name = first.setdefault(id(item.tensor), name)
        groups[main if main is not None and main in found else first_name].append(name)
    dropped: set[str] = set()
    for main, names in groups.items():
        if main not in names:
            # The group's main name is itself known under the name that was found first.
            names.insert(0, main)
        if any(not _same_value(found[main], found[name]) for name in names):
            all_names = " and ".join(name for name in found if name in names)
            raise ConfigError(
                f"{all_names} are one tied parameter, and an adapter on part of them gives each a "
                "value of its own, which the engines cannot hold. Leave the embedding and lm_head out of "
                "target_modules and modules_to_save, set ensure_weight_tying=True in the LoraConfig, or load the model "
                "with tie_word_embeddings=False."
            )
        dropped.update(name for name in names if name != main)
    return dropped


def _same_value(one: _Found, other: _Found) -> bool:
    """Whether two parameters are one tensor, adapted by the same factors or by none."""
    if one.tensor is not other.tensor or len(one.layers) != len(other.layers):
        return False
    return one.layers == other.layers or all(map(_tied_adapters, one.layers, other.layers))


def _tied_adapters(one: Any, other: Any) -> bool:
    """Whether PEFT has tied the factors of two layers (`ensure_weight_tying`)."""
    if uses_variant(one) or uses_variant(other) or adapters_of(one) != adapters_of(other):
        return False
    return all(
        _factor_memory(one, adapter) == _factor_memory(other, adapter)
        and one.scaling[adapter] == other.scaling[adapter]
        for adapter in adapters_of(one)
    )


def _factor_memory(layer: Any, adapter: str) -> set[int]:
    if adapter in layer.lora_A:
        factors = [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
    else:
        factors = [layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]]
    # A sharded factor has no memory that could be compared: each is then its own.
    return {factor.data_ptr() if type(factor) is nn.Parameter and factor.numel() else id(factor) for factor in factors}


def _check_adapters(model: Any) -> None:
    active = model.active_adapters
    for name in active() if callable(active) else active:
        config = model.peft_config.get(name)
        kind = getattr(getattr(config, "peft_type", None), "value", None)
        if kind not in (None, "LORA"):
            raise ConfigError(
                f"the adapter {name!r} is of kind {kind}; only LoRA can be merged for the engines. Use peft.LoraConfig."
            )


def _base_dtype(core: Any) -> torch.dtype | None:
    """Return the type in which the model was loaded, for weights that do not say it themselves."""
    dtype = getattr(getattr(core, "config", None), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None
