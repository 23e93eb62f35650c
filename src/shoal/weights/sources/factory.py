"""Make the weight source of a model."""

from __future__ import annotations

import torch
from torch import nn

from shoal.protocols import WeightSource
from shoal.weights.sources.model_source import ModelSource


def make_source(
    model: nn.Module, *, wire_dtype: torch.dtype | None = None, merges_adapters: bool = True
) -> WeightSource:
    """Return the source of all weights of `model`, its active LoRA adapters merged.

    The model may be compiled, wrapped by DDP or PEFT, sharded by FSDP2 or DeepSpeed ZeRO-3, or quantised to 4 or 8 bits
    by bitsandbytes. On a sharded model every rank makes its own source, and all go through its tensors together.

    Args:
        model: As it trains.
        wire_dtype: Type of the values that are computed for sending (merged in float32, or dequantised), so that they
            are rounded once, to the engines' type. Default: the type of the base weights. Parameters that are sent as
            they lie keep their own type.
        merges_adapters: Or else, that the base is sent as it is, for engines that serve the adapter beside it.

    Raises:
        ConfigError: It is sharded, adapted or quantised in a way that cannot be sent.
    """
    return ModelSource(model, wire_dtype=wire_dtype, merges_adapters=merges_adapters)
