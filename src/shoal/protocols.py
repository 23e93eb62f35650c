"""The seams: what the rooms below expect of one another. A protocol exists where two implementations do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch

from shoal.types import ParameterMeta, Rollout, RolloutRequest


@runtime_checkable
class RolloutEngine(Protocol):
    """Something that writes completions: a managed vLLM server, or the slow exact reference."""

    @property
    def name(self) -> str:
        """Short name for messages and metrics, such as `"engine-0"`."""
        ...

    async def generate(self, request: RolloutRequest) -> Rollout:
        """Write one completion.

        Raises:
            EngineRequestError: The engine failed or answered with something malformed.
        """
        ...


@runtime_checkable
class WeightSource(Protocol):
    """Where the trainer's weights come from, named and shaped as the checkpoint has them."""

    def metadata(self) -> tuple[ParameterMeta, ...]:
        """Describe every parameter, in the order in which `tensors` yields them. Sends nothing."""
        ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each parameter's full current value. On sharded models this is a collective."""
        ...
