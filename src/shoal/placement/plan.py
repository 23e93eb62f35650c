"""The one way to a placement: (devices, request) → plan, or an error that says what would fit."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.errors import PlacementError
from shoal.placement.devices import Device
from shoal.placement.divide import divide, trainer_devices
from shoal.placement.records import PlacementPlan, PlacementRequest
from shoal.placement.suggest import suggest
from shoal.placement.warn import plan_warnings
from shoal.placement.wording import labels


def place_trainers(devices: Sequence[Device], num_processes: int) -> PlacementPlan:
    """Give trainer processes their devices, where engines are elsewhere. Pure.

    Raises:
        PlacementError: There are fewer GPUs than processes.
    """
    gpus = tuple(device for device in devices if device.kind == "cuda")
    trainers = trainer_devices(gpus, num_processes)
    idle = gpus[len(trainers) :]
    warnings = (
        f"{labels(idle)} will be idle: the engines are elsewhere. Launch more trainer processes to use every GPU.",
    )
    return PlacementPlan(trainers=trainers, engines=(), idle=idle, warnings=warnings if idle else ())


def place(devices: Sequence[Device], request: PlacementRequest) -> PlacementPlan:
    """Decide who gets which device of this host. Pure: the same arguments give the same plan.

    Args:
        devices: The GPUs of the host, in torch's order; empty on a host without.
        request: What is asked for.

    Raises:
        PlacementError: It cannot be done. The message says what and why, and names settings that can be.
    """
    try:
        division = divide(devices, request)
    except PlacementError as refusal:
        advice = ", or ".join(suggestion.text for suggestion in suggest(devices, request))
        raise PlacementError(f"{refusal}\n{advice[:1].upper()}{advice[1:]}." if advice else str(refusal)) from None
    return PlacementPlan(
        trainers=division.trainers,
        engines=division.engines,
        idle=division.idle,
        warnings=plan_warnings(devices, request, division),
    )
