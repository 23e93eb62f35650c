"""A LoRA adapter alone, for engines that serve it beside the base weights: a few megabytes instead of the model.

Its scaling is multiplied into `lora_B`, so that engines serve it with scaling 1, whatever alpha, rank patterns and
rsLoRA say. The folder that engines load once, at their start, is written the same way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from shoal.errors import ConfigError
from shoal.types import Interval, ParameterMeta
from shoal.weights.sources.shards import Value, WholeTensor, value_of
from shoal.weights.sources.variables import unwrapped
from shoal.wire.plan import dtype_from_name, dtype_name

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
# Ways to start an adapter that change the base weights too, which the engines have as they were.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_WHAT_TO_DO = 'Use vllm_lora_sync="merge".'


@dataclass(frozen=True, slots=True)
class _Factor:
    """One of the two factors of an adapted layer.

    Attributes:
        name: As PEFT saves it.
        value: What this rank has of it.
        scaling: What to multiply it with.
    """

    name: str
    value: Value
    scaling: float


class AdapterSource:
    """The factors of a model's active LoRA adapter, named as in PEFT's `adapter_model.safetensors`.

    It keeps a copy of the adapter in the type sent. Scratch: the scaled factors in float32; of a sharded model one
    factor at a time, and no copy is kept.

    Args:
        model: Of PEFT; sharded or not.
        wire_dtype: Type of what is sent; the default is the adapter's.

    Raises:
        ConfigError: Engines cannot serve this adapter.
    """

    def __init__(self, model: nn.Module, *, wire_dtype: torch.dtype | None = None) -> None:
        self._model = unwrapped(model)
        self._wire_dtype = wire_dtype
        self._adapter = _active_adapter(self._model)
        # Found once: going through all modules takes longer than sending what they hold.
        self._layers = tuple(_adapted_layers(self._model, self._adapter))
        self._sharded = tuple(module for module in self._model.modules() if isinstance(module, FSDPModule))
        factors = list(self._factors())
        self._metadata = tuple(
            ParameterMeta(
                name=factor.name, dtype=dtype_name(wire_dtype or factor.value.dtype), shape=factor.value.shape
            )
            for factor in factors
        )
        types = {meta.dtype for meta in self._metadata}
        self._copy: _ScaledCopy | None = None
        if len(types) == 1 and all(isinstance(factor.value, WholeTensor) for factor in factors):
            self._copy = _ScaledCopy([meta.name for meta in self._metadata], dtype_from_name(types.pop()))
        if not self._metadata:
            raise ConfigError(f"no layer of the model has the adapter {self._adapter!r}, so there is nothing to send.")
        self._held = {factor.name: factor.value.interval for factor in factors if factor.value.interval.size > 0}

    def metadata(self) -> tuple[ParameterMeta, ...]:
        """Describe both factors of every adapted layer."""
        return self._metadata

    def held(self) -> Mapping[str, Interval]:
        """Return which elements of each factor this rank has."""
        return self._held

    def in_place(self) -> frozenset[str]:
        """Name all of an adapter of which a copy is kept: it lies where it lay, with other values."""
        return frozenset() if self._copy is None else frozenset(meta.name for meta in self._metadata)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the current factors, flat, `lora_B` scaled.

        Raises:
            ConfigError: Another adapter is active than when the source was made.
        """
        if _active_adapter(self._model) != self._adapter:
            raise ConfigError(f"the engines serve the adapter {self._adapter!r}, and another is active now")
        if self._copy is not None:
            _, weights, scalings = zip(*self._weights(), strict=True)
            yield from self._copy.renew(weights, scalings)
            return
        for factor in self._factors():
            yield factor.name, _scaled(factor, factor.value.local(), self._wire_dtype)

    @torch.no_grad()
    def whole_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the same in full shapes. On a sharded model all ranks must go through it to the end."""
        for factor in self._factors():
            yield factor.name, _scaled(factor, factor.value.whole(), self._wire_dtype)

    def _factors(self) -> Iterator[_Factor]:
        for name, weight, scaling in self._weights():
            yield _Factor(name, value_of(name, weight), scaling)

    def _weights(self) -> Iterator[tuple[str, torch.Tensor, float]]:
        for module in self._sharded:
            module.reshard()
        for path, layer in self._layers:
            for local, scaling in (("lora_A", 1.0), ("lora_B", float(layer.scaling[self._adapter]))):
                # What `getattr` finds, without its detours: there are hundreds.
                weight = layer._modules[local]._modules[self._adapter]._parameters["weight"]
                yield f"{path}.{local}.weight", weight, scaling


class _ScaledCopy:
    """All factors of an adapter that is whole here, scaled, one after the other in memory that is kept.

    Args:
        names: Of the factors.
        dtype: In which they are sent.
    """

    def __init__(self, names: Sequence[str], dtype: torch.dtype) -> None:
        self._names = tuple(names)
        self._dtype = dtype
        self._rooms: list[torch.Tensor] = []
        self._sent: list[tuple[str, torch.Tensor]] = []

    @torch.no_grad()
    def renew(self, weights: Sequence[torch.Tensor], scalings: Sequence[float]) -> list[tuple[str, torch.Tensor]]:
        """Return the factors, flat, with a few kernels for all of them."""
        values = list(weights)
        scaled = [index for index, scaling in enumerate(scalings) if scaling != 1.0]
        if scaled:
            exact = [values[index].to(torch.float32) for index in scaled]
            products = torch._foreach_mul(exact, [scalings[index] for index in scaled])
            for index, product in zip(scaled, products, strict=True):
                values[index] = product
        if not self._rooms or self._rooms[0].device != values[0].device:
            sizes = [value.numel() for value in values]
            parts = torch.split(torch.empty(sum(sizes), dtype=self._dtype, device=values[0].device), sizes)
            self._rooms = [part.view(value.shape) for part, value in zip(parts, values, strict=True)]
            self._sent = list(zip(self._names, parts, strict=True))
        torch._foreach_copy_(self._rooms, values)
        return self._sent


def write_adapter(model: nn.Module, folder: Path, *, write: bool = True) -> None:
    """Write the active adapter as engines are to load it: lora_alpha = r, and `lora_B` already scaled.

    On a sharded model every rank must call it, and one of them writes.

    Args:
        model: Of PEFT.
        folder: Where to; made if need be.
        write: Whether this rank writes.

    Raises:
        ConfigError: Engines cannot serve this adapter.
    """
    source = AdapterSource(model)
    tensors = {name: value.cpu().contiguous().clone() for name, value in source.whole_tensors()}
    if not write:
        return
    from safetensors.torch import save_file

    adapted = unwrapped(model)
    config = adapted.peft_config[_active_adapter(adapted)]
    rank = max(value.shape[0] for name, value in tensors.items() if name.endswith(".lora_A.weight"))
    targets = sorted({name.removesuffix(".weight").rpartition(".")[0].rpartition(".")[2] for name in tensors})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model_name_or_path,
        "r": rank,
        # With alpha equal to the rank the scaling is 1. Layers of smaller rank (rank_pattern) share it.
        "lora_alpha": rank,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "lora_bias": False,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": targets,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / _WEIGHTS), metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _adapted_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """Yield every layer that has the adapter, under the path that PEFT saves it by."""
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            path = path.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
            path = _PREFIX + path[path.find(_PREFIX) + len(_PREFIX) if _PREFIX in path else 0 :]
            _check_servable(path, layer, adapter)
            if adapter in layer.lora_A:
                yield path, layer


@torch.no_grad()
def _scaled(factor: _Factor, value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if factor.scaling == 1.0:
        return value.to(dtype or value.dtype)
    return (value.to(torch.float32) * factor.scaling).to(dtype or value.dtype)


def _active_adapter(model: Any) -> str:
    """Return the one active adapter.

    Raises:
        ConfigError: There is none, there are several, or it is of a kind that changes more than two factors can say.
    """
    active = model.active_adapters if hasattr(model, "peft_config") else []
    names = [str(name) for name in (active() if callable(active) else active)]
    if len(names) != 1:
        raise ConfigError(f"engines serve one adapter, and {names or 'none'} are active. {_WHAT_TO_DO}")
    config = model.peft_config[names[0]]
    if getattr(config.peft_type, "value", config.peft_type) != "LORA":
        raise ConfigError(f"engines serve LoRA adapters only, not {config.peft_type}. Use peft.LoraConfig.")
    for setting in ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"):
        if getattr(config, setting, None):
            raise ConfigError(f"engines cannot serve an adapter with {setting}. {_WHAT_TO_DO}")
    if config.bias != "none":
        raise ConfigError(f"engines cannot serve an adapter that trains biases (bias={config.bias!r}). {_WHAT_TO_DO}")
    start = str(config.init_lora_weights).lower()
    if start.startswith(_CHANGES_BASE):
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights, which the engines have as they "
            f"were. {_WHAT_TO_DO}"
        )
    return names[0]


def _check_servable(path: str, layer: Any, adapter: str) -> None:
    if adapter in layer.lora_embedding_A:
        raise ConfigError(f"{path} is an adapted embedding, which engines cannot serve as an adapter. {_WHAT_TO_DO}")
    if adapter not in layer.lora_A:
        return
    if adapter in layer.lora_variant:
        kind = type(layer.lora_variant[adapter]).__name__
        raise ConfigError(f"{path} uses {kind}, which engines cannot serve as an adapter. {_WHAT_TO_DO}")
    if layer.lora_bias.get(adapter):
        raise ConfigError(f"{path} has a LoRA bias, which engines cannot serve. Set lora_bias=False, or: {_WHAT_TO_DO}")
    if len(layer.lora_A[adapter].weight.shape) != 2 or not math.isfinite(layer.scaling[adapter]):
        raise ConfigError(f"{path} is a LoRA {type(layer).__name__}, which engines cannot serve. {_WHAT_TO_DO}")
