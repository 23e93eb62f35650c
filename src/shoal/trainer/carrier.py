"""What carries weights from the trainer processes to an engine of the same host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from shoal.config import GRPOConfig
from shoal.errors import ConfigError
from shoal.placement.devices import Device, visible_ids_beside
from shoal.placement.records import EnginePlacement
from shoal.wire.device_memory import can_open
from shoal.wire.transport import Backend


def backend_for(engine: EnginePlacement, trainers: Sequence[Device], args: GRPOConfig) -> Backend:
    """Choose how an engine gets its weights.

    Where the engine's GPUs reach the trainers' memory, it copies out of that: NCCL takes memory and multiprocessors on
    both sides, and refuses two processes on one GPU.

    Args:
        engine: Where it runs.
        trainers: The GPU of each trainer process.
        args: The settings.

    Raises:
        ConfigError: `weight_sync_backend` asks for what these devices cannot have.
    """
    asked = args.weight_sync_backend
    if engine.devices[0].kind != "cuda":
        if asked != "auto":
            raise ConfigError(
                f"weight_sync_backend={asked!r} is about GPUs, and {engine.name} runs on the CPU. Remove it."
            )
        return "gloo"
    if engine.colocated and asked == "nccl":
        raise ConfigError(
            f'weight_sync_backend="nccl" cannot carry weights to {engine.name}, which shares a GPU with a trainer '
            "process: NCCL refuses two processes on one GPU. Remove it, or give engines their own GPUs (vllm_devices)."
        )
    if asked != "auto":
        return cast(Backend, asked)
    if engine.colocated:
        return "ipc"
    own, others = ([device.index for device in devices] for devices in (engine.devices, trainers))
    return "ipc" if can_open(own, others) else "nccl"


def opened_devices(engine: EnginePlacement, trainers: Sequence[Device], backend: Backend | None) -> tuple[str, ...]:
    """Return the GPUs beside its own that an engine's processes must see, as `CUDA_VISIBLE_DEVICES` names them."""
    return visible_ids_beside(engine.devices, trainers) if backend == "ipc" else ()
