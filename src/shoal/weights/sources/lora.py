"""A base weight with its LoRA adapters merged, in scratch memory; the base weight is never written.

Merging and unmerging it in place would let rounding errors pile up. The arithmetic is PEFT's own, run on a stand-in of
the layer whose parameters are whole and in scratch. Base and deltas are added in float32 and rounded once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shoal.errors import ConfigError
from shoal.types import Interval
from shoal.weights.sources.quantised import is_quantised
from shoal.weights.sources.shards import Value, value_of

_ROUTED = {"ALoraLinearVariant", "ArrowLinearVariant"}
_BLOCK_ELEMENTS = 1 << 22  # of a plain adapter's merge, at once: 16 MiB in float32
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class MergedTensor:
    """A parameter of an adapted layer's base.

    Of a sharded model only what is needed is gathered: the factors of plain LoRA, whose delta is then added to the
    elements that this rank holds, and the base weight too for variants (DoRA) that depend on all of it. Peak scratch:
    for plain adapters of linear layers the merged elements in `dtype` and three blocks of 16 MiB; otherwise the delta
    and the merged elements in float32, and PEFT's own temporaries.

    Args:
        base: The base parameter.
        layers: The tuner layers around its module that adapt it, the innermost first.
        local: Its name in that module, such as `"weight"`.
        dtype: Of the merged values; the default is the base's.
    """

    is_in_place = False

    def __init__(self, base: Value, layers: list[Any], local: str, dtype: torch.dtype | None) -> None:
        self._base = base
        self._layers = layers
        self._local = local
        self.shape = base.shape
        self.dtype = dtype or base.dtype
        self.interval = base.interval

    def local(self) -> torch.Tensor:
        """Return the elements that this rank holds, merged."""
        return self._merged(self._base.local, self.interval)

    def whole(self) -> torch.Tensor:
        """Return all elements, merged."""
        return self._merged(self._base.whole, self._everything).view(self.shape)

    @property
    def _everything(self) -> Interval:
        return Interval(0, torch.Size(self.shape).numel())

    def _merged(self, base: Callable[[], torch.Tensor], wanted: Interval) -> torch.Tensor:
        """Return the elements `wanted`, merged; `base` returns them unmerged, and may be a collective."""
        if self._local == "weight" and all(_is_plain_linear(layer) for layer in self._layers):
            return self._merged_by_rows(base().reshape(-1), wanted)
        depends = self._local != "bias" and any(uses_variant(layer) for layer in self._layers)
        held = self._everything if depends else wanted
        total = (self._base.whole() if depends else base()).to(torch.float32, copy=True).reshape(-1)
        for layer in self._layers:
            for adapter in adapters_of(layer):
                if self._local == "bias" and layer.lora_bias.get(adapter):
                    total = _add(total, _bias_delta(layer, adapter), held)
                elif self._local != "bias" and not depends:
                    total = _add(total, _delta(layer, adapter, self.shape), held)
            if depends:
                total = _merge_all(layer, total.view(self.shape)).reshape(-1)
        return total[wanted.start - held.start : wanted.stop - held.start].to(self.dtype)

    def _merged_by_rows(self, base: torch.Tensor, held: Interval) -> torch.Tensor:
        """Return `base`, which are the elements `held`, with the adapters' products, some rows at a time."""
        factors = [_factors(layer, adapter) for layer in self._layers for adapter in adapters_of(layer)]
        width, device = self.shape[1], factors[0].left.device
        merged = torch.empty(held.size, dtype=self.dtype, device=device)
        num_rows = max(1, _BLOCK_ELEMENTS // width)
        last = -(-held.stop // width) if held.size > 0 else 0
        for row in range(held.start // width, last, num_rows):
            rows = slice(row, min(row + num_rows, last))
            piece = Interval(rows.start * width, rows.stop * width).overlap(held)
            here = slice(piece.start - held.start, piece.stop - held.start)
            # The base may be offloaded; the sum is formed where the factors are.
            block = base[here].to(device, torch.float32, copy=True)
            for factor in factors:
                delta = (factor.left[rows] @ factor.right).mul_(factor.scaling).reshape(-1)
                block.add_(delta[piece.start - rows.start * width : piece.stop - rows.start * width])
            merged[here] = block
        return merged


@dataclass(frozen=True, slots=True)
class _Factors:
    """What a plain adapter adds to a weight: `left @ right * scaling`, the factors whole and in float32."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float


def _is_plain_linear(layer: Any) -> bool:
    """Whether all that a layer adds to its weight are products of two factors: PEFT's `lora.Linear` alone."""
    kind = type(layer)
    return (kind.__module__, kind.__name__) == ("peft.tuners.lora.layer", "Linear") and not uses_variant(layer)


def _factors(layer: Any, adapter: str) -> _Factors:
    a, b = (
        value_of(f"{name}.weight", getattr(layer, name)[adapter].weight).whole().to(torch.float32)
        for name in ("lora_A", "lora_B")
    )
    left, right = (a.T, b.T) if layer.fan_in_fan_out else (b, a)
    return _Factors(left, right, float(layer.scaling[adapter]))


def adapters_of(layer: Any) -> list[str]:
    """Return the active adapters that a layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A or name in layer.lora_embedding_A]


def uses_variant(layer: Any) -> bool:
    """Whether an active adapter is more than the product of two factors (DoRA and others)."""
    return any(name in layer.lora_variant for name in adapters_of(layer))


def check_mergeable(name: str, layer: Any) -> None:
    """Refuse what no merged weight can stand for.

    Raises:
        ConfigError: Naming the layer.
    """
    kind = type(layer).__name__
    if not hasattr(layer, "lora_A"):
        raise ConfigError(
            f"{name} carries a {kind} adapter; only LoRA can be merged for the engines. Use peft.LoraConfig."
        )
    variants = {type(layer.lora_variant[adapter]).__name__ for adapter in adapters_of(layer) if uses_variant(layer)}
    if routed := sorted(variants & _ROUTED):
        raise ConfigError(
            f"{name} uses {', '.join(routed)}, which treats each token differently, so no merged weight stands for it. "
            "Use a plain peft.LoraConfig."
        )
    if kind == "MultiheadAttention" or any("QALora" in variant for variant in variants):
        raise ConfigError(
            f"{name} is a LoRA {kind}, which cannot be merged in scratch. Leave it out of target_modules."
        )
    base = layer.get_base_layer()
    if variants and len(adapters_of(layer)) > 1 and is_quantised(base.weight):
        raise ConfigError(f"{name} has several adapters, one of them not plain LoRA, over quantised weights. Use one.")
    if any(layer.lora_bias.get(adapter) for adapter in adapters_of(layer)) and getattr(base, "bias", None) is None:
        raise ConfigError(
            f"{name} has a LoRA bias and no bias of its own, so the engines have no place for it. Set lora_bias=False."
        )


def has_bias(layer: Any) -> bool:
    """Whether an active adapter adds to the base's bias."""
    return any(layer.lora_bias.get(name) for name in adapters_of(layer))


def _add(total: torch.Tensor, delta: torch.Tensor, held: Interval) -> torch.Tensor:
    piece = delta.reshape(-1)[held.start : held.stop]
    # The base may be offloaded; the sum is formed where the factors are.
    return total.to(piece.device).add_(piece)


def _bias_delta(layer: Any, adapter: str) -> torch.Tensor:
    bias = layer.lora_B[adapter].bias
    return value_of("lora_B.bias", bias).whole() * float(layer.scaling[adapter])


def _delta(layer: Any, adapter: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return what an adapter adds to the whole weight; of the base only the shape is needed."""

    def base(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float32, device=tensor.device).expand(shape)

    result: torch.Tensor = _stand_in(layer, base, adapter).get_delta_weight(adapter)
    return result


def _merge_all(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` with every active adapter merged in turn, as PEFT's `merge` does it."""
    layer = _stand_in(layer, lambda _: weight, *adapters_of(layer))
    base = layer.get_base_layer()
    for adapter in adapters_of(layer):
        if adapter in layer.lora_variant:
            weight = layer.lora_variant[adapter].merge_safe(layer, adapter, weight)
        else:
            weight = weight + layer.get_delta_weight(adapter)
        base.weight = nn.Parameter(weight, requires_grad=False)
        layer.merged_adapters.append(adapter)
    return weight


def _stand_in(layer: Any, base: Callable[[torch.Tensor], torch.Tensor], *adapters: str) -> Any:
    """Copy a layer's structure, with whole factors of the given adapters, and `base` for its base weight."""
    base_module = layer.get_base_layer()
    local = getattr(layer, "parameter_name", "weight")

    def copied(module: nn.Module, path: tuple[str, ...]) -> nn.Module:
        new: Any = object.__new__(type(module))
        new.__dict__.update(module.__dict__)
        # PEFT keeps its state in plain lists and dicts; what it notes there is not for the model.
        new.__dict__.update({key: list(value) for key, value in module.__dict__.items() if isinstance(value, list)})
        new.__dict__.update({key: OrderedDict() for key in _HOOKS}, _caches={})
        new._parameters = {key: replaced(module, key, value, path) for key, value in module._parameters.items()}
        new._modules = {key: child and copied(child, (*path, key)) for key, child in module._modules.items()}
        return new  # type: ignore[no-any-return]

    def replaced(module: nn.Module, key: str, value: Any, path: tuple[str, ...]) -> Any:
        if value is None:
            return None
        if module is base_module:
            # What else the base has is not looked at.
            return nn.Parameter(base(value), requires_grad=False) if key == local else value
        if "base_layer" not in path and any(adapter in (*path, key) for adapter in adapters):
            return nn.Parameter(value_of(".".join((*path, key)), value).whole(), requires_grad=False)
        return value

    return copied(layer, ())
