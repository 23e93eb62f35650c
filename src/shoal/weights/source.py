"""The trainer's weights under the names and in the shapes that a checkpoint has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from shoal.errors import ConfigError
from shoal.protocols import WeightSource
from shoal.types import ParameterMeta
from shoal.wire.plan import dtype_name


def make_source(model: nn.Module) -> WeightSource:
    """Return the source for an unwrapped model: plain, or with LoRA adapters of PEFT.

    Raises:
        ConfigError: The adapter is of a kind that cannot be merged for sending yet.
    """
    if hasattr(model, "peft_config"):
        return LoraMergedSource(model)
    return ModuleSource(model)


class ModuleSource:
    """A module's own parameters. Tied ones appear once, as in a checkpoint."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def metadata(self) -> tuple[ParameterMeta, ...]:
        """Describe every parameter."""
        return tuple(
            ParameterMeta(name=name, dtype=dtype_name(value.dtype), shape=tuple(value.shape))
            for name, value in self._model.named_parameters()
        )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each parameter as it lies; nothing is copied."""
        for name, value in self._model.named_parameters():
            yield name, value.detach()


class LoraMergedSource:
    """A PEFT model's weights with its active LoRA adapters added, one matrix at a time, in scratch memory.

    The base weights are never written: merging and unmerging them in place would let rounding errors pile up.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._lora_layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "base_layer")}
        for name, layer in self._lora_layers.items():
            _check_mergeable(name, layer)

    def metadata(self) -> tuple[ParameterMeta, ...]:
        """Describe every parameter of the merged model."""
        return tuple(
            ParameterMeta(name=clean, dtype=dtype_name(value.dtype), shape=tuple(value.shape))
            for _, clean, value in self._base_parameters()
        )

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each parameter, those with an adapter merged."""
        for name, clean, value in self._base_parameters():
            layer_name, marker, local = name.rpartition(".base_layer.")
            if marker and local == "weight":
                yield clean, self._merged(self._lora_layers[layer_name], value)
            else:
                yield clean, value.detach()

    def _base_parameters(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield PEFT's name, the checkpoint's name and the value of every parameter that a merged model has."""
        for name, value in self._model.named_parameters():
            if ".lora_" in name or ".original_module." in name:
                continue
            clean = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            for adapter in _active_adapters(self._model):
                clean = clean.replace(f".modules_to_save.{adapter}.", ".")
            yield name, clean, value

    @staticmethod
    def _merged(layer: Any, value: torch.Tensor) -> torch.Tensor:
        if layer.merged:
            return value.detach()
        total = value.detach().to(torch.float32, copy=True)
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
                total += layer.get_delta_weight(adapter).to(torch.float32)
        return total.to(value.dtype)


def _active_adapters(model: Any) -> list[str]:
    active = model.active_adapters
    return list(active() if callable(active) else active)


def _check_mergeable(name: str, layer: Any) -> None:
    if not hasattr(layer, "lora_A"):
        raise ConfigError(
            f"{name} carries a {type(layer).__name__} adapter; only LoRA can be merged for the engines. "
            "Use peft.LoraConfig."
        )
    if any(getattr(layer, "use_dora", {}).values()):
        raise ConfigError(f"{name} uses DoRA, whose merged weights cannot be sent yet. Set use_dora=False.")
