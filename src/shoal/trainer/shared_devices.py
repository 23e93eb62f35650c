"""What a trainer rank does for engines that use its GPU: it gives memory back before they wake, and takes it again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shoal.config import GRPOConfig
from shoal.errors import ConfigError
from shoal.placement.records import EnginePlacement
from shoal.protocols import Ranks
from shoal.trainer.optimizer_offload import OptimizerOffload


def sleeps(engine: EnginePlacement, args: GRPOConfig) -> bool:
    """Whether this engine is to sleep while the trainer works: it shares a GPU with it, unless the settings forbid."""
    return engine.colocated and args.vllm_enable_sleep_mode is not False


def check_sharing(engines: Sequence[EnginePlacement], args: GRPOConfig) -> None:
    """Refuse settings for engines that share GPUs with trainer processes, where none does.

    Raises:
        ConfigError: Such a setting would be ignored.
    """
    if any(engine.colocated for engine in engines):
        return
    for name in ("vllm_enable_sleep_mode", "offload_optimizer_during_rollout"):
        if getattr(args, name):
            raise ConfigError(
                f"{name}=True has no effect: it gives the memory of GPUs to and fro between engines and trainer "
                f'processes, and no engine shares a GPU with one here. Remove it, or set vllm_devices="colocate".'
            )


def share_device(
    engines: Sequence[EnginePlacement], args: GRPOConfig, ranks: Ranks, optimizer: Callable[[], Any]
) -> SharedDevice | None:
    """Return what gives this rank's memory to and fro; None where no engine sleeps. A collective.

    Args:
        engines: As rank 0's host has them.
        args: The settings.
        ranks: The trainer's.
        optimizer: Gives the present optimizer; None before there is one.
    """
    if not ranks.json(lambda: any(sleeps(engine, args) for engine in engines)):
        return None
    return SharedDevice(args.device, optimizer if args.offload_optimizer_during_rollout else lambda: None)


class SharedDevice:
    """This rank's GPU, which it shares with an engine that sleeps in between.

    Args:
        device: The GPU.
        optimizer: Gives the optimizer whose states are to be moved to the host meanwhile; it gives None before there is
            one, and where they are to stay.
    """

    def __init__(self, device: torch.device, optimizer: Callable[[], Any]) -> None:
        self._device = device
        self._optimizer = optimizer
        self._offload: OptimizerOffload | None = None
        self._has_given = False

    def give(self) -> None:
        """Give back all memory that is not needed while engines write.

        Raises:
            ConfigError: The optimizer's states cannot be moved.
        """
        if (offload := self._present_offload()) is not None:
            offload.park()
        # Cycles hold tensors until they are collected. All are, once, before engines start; later only young ones:
        # going through all that was ever imported takes some 0.3 s.
        gc.collect(1 if self._has_given else 2)
        self._has_given = True
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def take(self) -> None:
        """Take again what training needs, now that the engines sleep."""
        if self._offload is not None:
            self._offload.bring_back()

    def _present_offload(self) -> OptimizerOffload | None:
        """Return what moves the present optimizer's states; each call of `train` makes a new optimizer."""
        optimizer = self._optimizer()
        if self._offload is not None and not self._offload.serves(optimizer):
            self._offload.close()
            self._offload = None
        if self._offload is None and optimizer is not None:
            self._offload = OptimizerOffload(optimizer, self._device)
        return self._offload
