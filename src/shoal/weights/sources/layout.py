"""How a model's parameters in memory appear in its checkpoint: names, and which part of which parameter.

transformers stacks experts (and more) while it loads, and takes them apart again while it saves. What it would do while
saving is learned once, by letting it do so with tensors that hold no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shoal.errors import ConfigError
from shoal.wire.plan import Region
from shoal.wire.recorder import OriginRecorder


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter of the checkpoint.

    Attributes:
        name: Its name there.
        region: Where it lies in the parameter in memory.
    """

    name: str
    region: Region

    @property
    def is_run(self) -> bool:
        """Whether its elements lie one after the other."""
        expected = 1
        for size, stride in zip(reversed(self.region.shape), reversed(self.region.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


def learn_layout(core: nn.Module, parameters: Mapping[str, torch.Tensor]) -> dict[str, tuple[Entry, ...]]:
    """Return the checkpoint's parameters that lie in each parameter in memory.

    Args:
        core: The model; its type decides.
        parameters: Meta tensors of the full shapes, under the names of the model in memory.

    Raises:
        ConfigError: A parameter of the checkpoint is computed from those in memory, not a part of one.
    """
    layout: dict[str, list[Entry]] = {name: [] for name in parameters}
    with OriginRecorder(parameters) as recorder:
        saved = _as_saved(core, parameters)
        for name, value in saved.items():
            origin = recorder.origin(value)
            if origin is None:
                raise ConfigError(
                    f"{name} of a {type(core).__name__} checkpoint is computed while saving, so there is no parameter "
                    "in memory to send it from. This architecture cannot be trained with engines yet."
                )
            layout[origin[0]].append(Entry(name, origin[1]))
    if missing := sorted(name for name, entries in layout.items() if not entries):
        raise ConfigError(
            f"a {type(core).__name__} checkpoint has no place for {missing[0]}, so it cannot be sent. This "
            "architecture cannot be trained with engines yet."
        )
    return {name: tuple(entries) for name, entries in layout.items()}


def _as_saved(core: nn.Module, parameters: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Let transformers turn `parameters` into what `save_pretrained` writes."""
    if not hasattr(core, "save_pretrained"):
        return parameters
    from transformers.core_model_loading import revert_weight_conversion

    try:
        saved: Mapping[str, torch.Tensor] = revert_weight_conversion(_WithoutQuantisation(core), dict(parameters))
    except Exception as error:
        raise ConfigError(
            f"transformers cannot say how a {type(core).__name__} is saved ({error!r}), so its parameters cannot be "
            "sent under the names that the engines know."
        ) from error
    return saved


class _WithoutQuantisation:
    """A model seen without the conversions that quantised its weights, which transformers cannot revert."""

    def __init__(self, core: nn.Module) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._core, name)
        if name == "_weight_conversions" and value is not None:
            value = [item for item in value if getattr(item, "quantization_operation", None) is None]
        return value
