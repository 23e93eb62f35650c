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
from shoal.wire.plan import dtype_name

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

    Scratch: the adapter, in float32 and in the type sent; of a sharded model one factor at a time.

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
        self._metadata = tuple(
            ParameterMeta(
                name=factor.name, dtype=dtype_name(wire_dtype or factor.value.dtype), shape=factor.value.shape
            )
            for factor in self._factors()
        )
        if not self._metadata:
            raise ConfigError(f"no layer of the model has the adapter {self._adapter!r}, so there is nothing to send.")
        self._held = {
            factor.name: factor.value.interval for factor in self._factors() if factor.value.interval.size > 0
        }

    def metadata(self) -> tuple[ParameterMeta, ...]:
        """Describe both factors of every adapted layer."""
        return self._metadata

    def held(self) -> Mapping[str, Interval]:
        """Return which elements of each factor this rank has."""
        return self._held

    def in_place(self) -> frozenset[str]:
        """Name nothing: factors are scaled, and put together."""
        return frozenset()

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the current factors, flat, `lora_B` scaled.

        Raises:
            ConfigError: Another adapter is active than when the source was made.
        """
        if _active_adapter(self._model) != self._adapter:
            raise ConfigError(f"the engines serve the adapter {self._adapter!r}, and another is active now")
        factors = list(self._factors())
        if all(isinstance(factor.value, WholeTensor) for factor in factors):
            yield from _scaled_together(factors, self._wire_dtype)
            return
        for factor in factors:
            yield factor.name, _scaled(factor, factor.value.local(), self._wire_dtype)

    @torch.no_grad()
    def whole_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the same in full shapes. On a sharded model all ranks must go through it to the end."""
        for factor in self._factors():
            yield factor.name, _scaled(factor, factor.value.whole(), self._wire_dtype)

    def _factors(self) -> Iterator[_Factor]:
        for module in self._sharded:
            module.reshard()
        for path, layer in self._layers:
            for local, scaling in (("lora_A", 1.0), ("lora_B", float(layer.scaling[self._adapter]))):
                name = f"{path}.{local}.weight"
                yield _Factor(name, value_of(name, getattr(layer, local)[self._adapter].weight), scaling)


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


def _scaled(factor: _Factor, value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if factor.scaling == 1.0:
        return value.to(dtype or value.dtype)
    return (value.to(torch.float32) * factor.scaling).to(dtype or value.dtype)


def _scaled_together(factors: Sequence[_Factor], dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what `_scaled` makes of each factor, with a few kernels for all of them, into one piece of memory."""
    values = [factor.value.local() for factor in factors]
    scaled = [index for index, factor in enumerate(factors) if factor.scaling != 1.0]
    if scaled:
        exact = [values[index].to(torch.float32) for index in scaled]
        products = torch._foreach_mul(exact, [factors[index].scaling for index in scaled])
        for index, product in zip(scaled, products, strict=True):
            values[index] = product
    types = [dtype or factor.value.dtype for factor in factors]
    if len(set(types)) > 1:
        yield from ((factor.name, value.to(kind)) for factor, value, kind in zip(factors, values, types, strict=True))
        return
    sizes = [value.numel() for value in values]
    memory = torch.empty(sum(sizes), dtype=types[0], device=values[0].device)
    rooms = torch.split(memory, sizes)
    torch._foreach_copy_(list(rooms), values)
    yield from ((factor.name, room) for factor, room in zip(factors, rooms, strict=True))


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
