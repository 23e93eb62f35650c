"""Keep an optimizer's states in host memory for a while, so that their GPU memory can be used for something else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shoal.errors import ConfigError

_PLAIN = (torch.Tensor, nn.Parameter)


@dataclass(frozen=True, slots=True)
class _Parked:
    """One storage whose bytes are in host memory.

    Attributes:
        storage: Empty meanwhile; the tensors that use it keep it, and their shapes.
        home: Its bytes.
    """

    storage: torch.UntypedStorage
    home: torch.Tensor


class OptimizerOffload:
    """Moves the states of an optimizer out to host memory, and back.

    It is the storages that are emptied and filled again: states stay the same tensors (FSDP2's `DTensor`s too), so
    neither the optimizer nor anybody else who holds one of them needs to know. Host memory is pinned on CUDA, and kept
    from one time to the next, since pinning takes longer than copying.

    Args:
        optimizer: Of torch, or accelerate's wrapper of one.
        device: Where the states lie that are moved. Others, such as the step counts of AdamW, stay where they are.

    Raises:
        ConfigError: The optimizer is none of torch's.
    """

    def __init__(self, optimizer: Any, device: torch.device) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(inner, torch.optim.Optimizer) or type(inner).__module__.startswith("bitsandbytes"):
            raise _unmovable(inner)
        self._optimizer = inner
        self._device = device
        self._parked: list[_Parked] = []
        self._free_homes: dict[int, list[torch.Tensor]] = defaultdict(list)
        # Whoever needs the values has them, in whatever order a trainer does things.
        self._hooks = (
            inner.register_step_pre_hook(lambda *_: self.bring_back()),
            inner.register_state_dict_pre_hook(lambda *_: self.bring_back()),
        )

    @property
    def num_bytes_parked(self) -> int:
        """Bytes that are in host memory and would else be on the device."""
        return sum(item.home.numel() for item in self._parked)

    def serves(self, optimizer: Any) -> bool:
        """Whether it is this optimizer's."""
        return self._optimizer is getattr(optimizer, "optimizer", optimizer)

    @torch.no_grad()
    def park(self) -> None:
        """Move the states to host memory, and their memory to torch's allocator.

        Raises:
            ConfigError: A state is of a kind that cannot be moved so.
        """
        if self._parked:
            return
        taken = {_local(parameter).untyped_storage().data_ptr() for parameter in self._parameters()}
        storages = {
            storage.data_ptr(): storage
            for storage in (_local(state).untyped_storage() for state in self._states())
            if storage.nbytes() and storage.data_ptr() not in taken
        }
        if self._optimizer.state and not storages:
            raise ConfigError(
                f"offload_optimizer_during_rollout=True has no effect: {type(self._optimizer).__qualname__} has no "
                f"states on {self._device}. Remove it."
            )
        parked = [_Parked(storage, self._home(storage.nbytes())) for storage in storages.values()]
        for item in parked:
            item.home.copy_(_bytes_of(item.storage), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # nothing may be emptied before it was read
        for item in parked:
            item.storage.resize_(0)
        self._parked = parked

    @torch.no_grad()
    def bring_back(self) -> None:
        """Move the states back: what the current stream does next finds them. Nothing happens if they are there."""
        parked, self._parked = self._parked, []
        for item in parked:
            item.storage.resize_(item.home.numel())
            _bytes_of(item.storage).copy_(item.home, non_blocking=True)
            # Written to again by the same stream only, after this copy.
            self._free_homes[item.home.numel()].append(item.home)

    def close(self) -> None:
        """Move the states back, and let go of the optimizer."""
        self.bring_back()
        for hook in self._hooks:
            hook.remove()

    def _parameters(self) -> Iterator[torch.Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _states(self) -> Iterator[torch.Tensor]:
        for entries in self._optimizer.state.values():
            for value in entries.values():
                if not isinstance(value, torch.Tensor) or value.device.type != self._device.type:
                    continue
                if type(_local(value)) not in _PLAIN:
                    raise _unmovable(value)
                yield value

    def _home(self, num_bytes: int) -> torch.Tensor:
        if free := self._free_homes[num_bytes]:
            return free.pop()
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank has of a tensor, in the tensor's own memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _unmovable(what: object) -> ConfigError:
    kind = f"{type(what).__module__}.{type(what).__qualname__}"
    return ConfigError(
        f"offload_optimizer_during_rollout=True cannot move the states of the optimizer: {kind} does not keep them in "
        "plain tensors. Use an optimizer of torch.optim, or remove the setting; 8-bit states are small, and paged ones "
        "leave the GPU by themselves when memory runs short."
    )
