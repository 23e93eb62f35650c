"""Read a device setting such as `"auto"`, `"cuda:2,cuda:3"`, `"4-7"` or `"cpu:2"`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from shoal.errors import PlacementError

_FORMS = 'Write "auto", "colocate", GPUs ("cuda:2,cuda:3" or "4-7"), or "cpu" ("cpu:2" for two CPU engines)'
_GPUS = re.compile(r"(?:cuda:)?(?P<first>\d+)(?:-(?P<last>\d+))?")
_CPU = re.compile(r"cpu(?::(?P<engines>\d+))?")
_MAX_INDEX = 1023  # Far beyond any host; keeps a slip such as "0-99999999" from filling memory.


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """A device setting, read but not yet compared with what the host has.

    Attributes:
        kind: `"auto"`, `"colocate"`, an explicit list of GPUs (`"cuda"`), or `"cpu"`.
        indices: The GPUs of an explicit list, in the order written; empty for the other kinds.
        num_engines: The N of `"cpu:N"`, else None.
    """

    kind: Literal["auto", "colocate", "cuda", "cpu"]
    indices: tuple[int, ...] = ()
    num_engines: int | None = None


def parse_devices(spec: str, *, setting: str = "vllm_devices") -> DeviceSpec:
    """Read a device setting.

    Args:
        spec: The setting's value.
        setting: Its name, for messages.

    Raises:
        PlacementError: The value cannot be read; the message names the piece that is wrong.
    """
    text = spec.strip()
    if text == "auto":
        return DeviceSpec(kind="auto")
    if text == "colocate":
        return DeviceSpec(kind="colocate")
    seen = f'{setting}="{spec}"'
    if cpu := _CPU.fullmatch(text):
        return DeviceSpec(kind="cpu", num_engines=_num_cpu_engines(cpu["engines"], seen))
    indices: list[int] = []
    for piece in text.split(","):
        for index in _indices(piece.strip(), seen):
            if index in indices:
                raise PlacementError(f"{seen} names cuda:{index} twice, but a GPU can serve one engine only. {_FORMS}.")
            indices.append(index)
    return DeviceSpec(kind="cuda", indices=tuple(indices))


def format_gpus(indices: tuple[int, ...]) -> str:
    """Write an explicit list of GPUs so that `parse_devices` reads it back: `"cuda:2,cuda:3"`."""
    return ",".join(f"cuda:{index}" for index in indices)


def _num_cpu_engines(digits: str | None, seen: str) -> int | None:
    if digits is None:
        return None
    if not 1 <= int(digits) <= _MAX_INDEX:
        raise PlacementError(f'{seen} asks for {digits} CPU engines: the number after "cpu:" counts engines. {_FORMS}.')
    return int(digits)


def _indices(piece: str, seen: str) -> range:
    match = _GPUS.fullmatch(piece)
    if match is None:
        why = "CPU engines cannot be mixed with GPUs" if _CPU.fullmatch(piece) else "it is not a GPU or a range of them"
        raise PlacementError(f"{seen} cannot be read at {piece!r}: {why}. {_FORMS}.")
    first = int(match["first"])
    last = int(match["last"] or first)
    if last < first:
        raise PlacementError(f"{seen} has the range {piece!r}, which runs backwards. Write {last}-{first}.")
    if last > _MAX_INDEX:
        raise PlacementError(f"{seen} cannot be read at {piece!r}: no host has a GPU numbered {last}. {_FORMS}.")
    return range(first, last + 1)
