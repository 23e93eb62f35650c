"""The trainer's weights under the names and in the shapes that a checkpoint has them."""

from __future__ import annotations

from collections import defaultdict
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
        _check_tied(model)

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
            if ".modules_to_save." in clean:
                continue  # an inactive adapter's
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
    if variants := {type(variant).__name__ for variant in getattr(layer, "lora_variant", {}).values()}:
        raise ConfigError(
            f"{name} uses {', '.join(sorted(variants))}, which cannot be merged for the engines yet. "
            "Use a plain peft.LoraConfig."
        )
    if any(getattr(layer, "lora_bias", {}).values()):
        raise ConfigError(f"{name} has a LoRA bias, which cannot be merged for the engines yet. Set lora_bias=False.")
    if getattr(layer, "parameter_name", "weight") != "weight" or hasattr(layer.base_layer, "base_layer"):
        raise ConfigError(
            f"{name} adapts a parameter by name (target_parameters), which cannot be merged for the engines yet. "
            "Use target_modules."
        )


def _check_tied(model: nn.Module) -> None:
    """Refuse an adapter on one of several tied parameters: it unties them here, and engines keep them tied."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[int, list[str]] = defaultdict(list)
    for name, value in parameters.items():
        tied[id(value)].append(name)
    for names in tied.values():
        used = {id(parameters.get(_in_use(model, name), parameters[name])) for name in names}
        if len(names) > 1 and (len(used) > 1 or any(".base_layer." in name for name in names)):
            raise ConfigError(
                f"{' and '.join(names)} are one tied parameter, and an adapter on part of them gives each a value "
                "of its own, which the engines cannot hold. Leave the embedding and lm_head out of target_modules and "
                "modules_to_save, or load the model with tie_word_embeddings=False."
            )


def _in_use(model: nn.Module, name: str) -> str:
    """Return the name of the parameter that computes in place of `name`: the trained copy of a module to save."""
    for adapter in _active_adapters(model):
        name = name.replace(".original_module.", f".modules_to_save.{adapter}.")
    return name
