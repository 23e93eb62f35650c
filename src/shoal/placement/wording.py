"""How devices and counts are written in messages."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.placement.devices import Device


def labels(devices: Sequence[Device]) -> str:
    """Write devices one after another: `"cuda:5, cuda:6"`."""
    return ", ".join(device.label for device in devices)


def counted(number: int, one: str, many: str | None = None) -> str:
    """Write a number with its noun: `"1 GPU"`, `"3 GPUs"`; `many` is for plurals that do not end in a bare s."""
    return f"{number} {one if number == 1 else many or one + 's'}"
