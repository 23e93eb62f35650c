"""What the trainer tells an engine's workers before the first publish, in plain JSON."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from shoal.types import Interval
from shoal.wire.schedule import Holdings

Cargo = str
"""What is sent under one plan: `MODEL` or `ADAPTER`."""

Verify = Literal["digest", "full", "off"]
"""How what a publish brought is compared: by digests, bit for bit as well, or not."""

MODEL = "model"
"""All weights; under a served adapter, those of its base."""

ADAPTER = "adapter"
"""The factors of a LoRA adapter alone, for engines that serve it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """All that a worker must know to follow a publish, besides its own plan.

    Attributes:
        wanted: Parameters that some engine has a use for: batches are made of these.
        holdings: For each trainer rank, what it holds.
        batch_bytes: Bound on one batch.
        preferred: For each worker, the ranks that send whatever they hold of what it needs.
    """

    wanted: frozenset[str]
    holdings: tuple[Holdings, ...]
    batch_bytes: int
    preferred: tuple[frozenset[int], ...]

    def to_json(self) -> str:
        """Serialise; `from_json` is the inverse."""
        return json.dumps(
            {
                "wanted": sorted(self.wanted),
                "holdings": [holdings_to_json(holding) for holding in self.holdings],
                "batch_bytes": self.batch_bytes,
                "preferred": [sorted(ranks) for ranks in self.preferred],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Agreement:
        """Parse what `to_json` wrote.

        Raises:
            ValueError: It is not such a text.
        """
        try:
            data = json.loads(text)
            return cls(
                wanted=frozenset(str(name) for name in data["wanted"]),
                holdings=tuple(holdings_from_json(item) for item in data["holdings"]),
                batch_bytes=int(data["batch_bytes"]),
                preferred=tuple(frozenset(int(rank) for rank in ranks) for ranks in data["preferred"]),
            )
        except (KeyError, TypeError, OverflowError, AttributeError, RecursionError) as error:
            raise ValueError(f"not an agreement: {error!r}") from error


def holdings_to_json(holdings: Holdings) -> dict[str, list[int]]:
    """Describe what a rank holds in plain JSON types."""
    return {name: [interval.start, interval.stop] for name, interval in holdings.items()}


def holdings_from_json(data: Mapping[str, list[int]]) -> Holdings:
    """Parse what `holdings_to_json` wrote."""
    return {str(name): Interval(int(start), int(stop)) for name, (start, stop) in data.items()}


def own_version() -> str:
    """Return the version of Shoal that is installed, which both ends must have in common."""
    return importlib.metadata.version("shoal")


def done_key(worker: int) -> str:
    """Key under which a worker leaves the number of the last publish that it has finished."""
    return f"done/{worker}"


def gave_up_key(worker: int) -> str:
    """Key under which a worker leaves the number of the last publish that it has failed at.

    One that has left it is not the one that the others wait for.
    """
    return f"gave_up/{worker}"


def device_identity(device: torch.device) -> str:
    """Return what tells a GPU from all others, in every process that sees it; `"cpu"` for a CPU."""
    if device.type != "cuda":
        return device.type
    return str(torch.cuda.get_device_properties(device).uuid)
