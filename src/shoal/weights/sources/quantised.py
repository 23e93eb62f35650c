"""Weights that bitsandbytes keeps in 4 or 8 bits (QLoRA), as the numbers that they stand for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shoal.errors import ConfigError
from shoal.types import Interval

KINDS = {"Params4bit": "4-bit", "Int8Params": "8-bit"}
"""Types of parameters, by the name of their class: bitsandbytes need not be installed."""


LAYERS = {"Linear4bit": "4-bit", "Linear8bitLt": "8-bit"}
"""Types of the layers that have them."""


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether bitsandbytes keeps this parameter."""
    return type(tensor).__name__ in KINDS


def check_whole(name: str, local: str, module: nn.Module, tensor: torch.Tensor) -> None:
    """Refuse a quantised weight that is divided among ranks. FSDP2 makes a plain DTensor of its packed bytes.

    Args:
        name: For messages.
        local: The parameter's name in its module.
        module: That has it.
        tensor: The parameter.

    Raises:
        ConfigError: It is one.
    """
    kind = LAYERS.get(type(module).__name__) if local == "weight" else None
    if kind is not None and (isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")):
        raise ConfigError(
            f"{name} is {kind} and sharded, so no rank can dequantise it. Train with DDP, ZeRO-1 or ZeRO-2, which keep "
            "weights whole."
        )


class DequantisedTensor:
    """A quantised weight, named and shaped as in the checkpoint that it was quantised from.

    It is dequantised anew each time into scratch, one matrix at a time.

    Args:
        name: For messages.
        module: That has it.
        weight: The parameter.
        dtype: Of the answer; the default is the type that was quantised.
        base_dtype: That type, for 8 bits, which do not know it.

    Raises:
        ConfigError: It was never quantised.
    """

    is_in_place = False

    def __init__(
        self,
        name: str,
        module: nn.Module,
        weight: Any,
        *,
        dtype: torch.dtype | None,
        base_dtype: torch.dtype | None,
    ) -> None:
        kind = KINDS[type(weight).__name__]
        self._module: Any = module
        self._weight = weight
        if kind == "4-bit":
            state = weight.quant_state
            if state is None:
                raise ConfigError(f"{name} is a {kind} weight that is not quantised yet. Move the model to its device.")
            self.shape = tuple(state.shape)
            self.dtype: torch.dtype = dtype or getattr(state, "original_dtype", state.dtype)
        else:
            self.shape = tuple(weight.shape)
            self.dtype = dtype or base_dtype or torch.float16
        self.interval = Interval(0, torch.Size(self.shape).numel())

    def local(self) -> torch.Tensor:
        """Return all its numbers."""
        return self.whole().reshape(-1)

    def whole(self) -> torch.Tensor:
        """Return all its numbers."""
        from bitsandbytes import functional

        weight = self._weight
        if type(weight).__name__ == "Params4bit":
            packed, state = weight.data, weight.quant_state
            if getattr(state, "packing_format_for_cpu", False):
                packed, state = _unpacked(packed, state)
            value = functional.dequantize_4bit(packed, state)
        else:
            # The first forward pass moves the scales from the weight to its module.
            scales = weight.SCB if weight.SCB is not None else self._module.state.SCB
            value = functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
        result: torch.Tensor = value.to(self.dtype).view(self.shape)
        return result


def _unpacked(packed: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """Undo what bitsandbytes (>= 0.49) does to 4-bit weights in a forward pass on a CPU with AVX512.

    It also rounds their scales to bfloat16 for good; those are what the model computes with from then on.
    """
    from bitsandbytes import functional

    state = copy.copy(state)  # unpacking writes into it, and it stays the weight's own
    scales = state.absmax.t().reshape(-1).to(torch.float32)
    state.original_nested = False  # quantising the scales once more would change them again
    packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, state)
    state.absmax = scales  # bitsandbytes turns them back only together with quantising them
    return packed, state
