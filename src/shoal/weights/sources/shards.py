"""Where a parameter's elements are: all here (plain, DDP), rows of it (FSDP2), or a run of elements (ZeRO-3)."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from shoal.errors import ConfigError
from shoal.types import Interval


class Value(Protocol):
    """A parameter of the model in memory, of which this rank holds a run of elements."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The full shape."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of what `local` and `whole` return."""
        ...

    @property
    def interval(self) -> Interval:
        """What this rank holds of the flattened parameter; of size 0 where that is nothing."""
        ...

    @property
    def is_in_place(self) -> bool:
        """Whether `local` returns a view of what is held, rather than something computed."""
        ...

    def local(self) -> torch.Tensor:
        """Return the elements of `interval`, flat and contiguous. All ranks must call it, in the same order."""
        ...

    def whole(self) -> torch.Tensor:
        """Return the full parameter, gathered into scratch if need be. All ranks must call it, in the same order."""
        ...


class WholeTensor:
    """A tensor that every rank has in full."""

    is_in_place = True

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self.interval = Interval(0, tensor.numel())

    def local(self) -> torch.Tensor:
        """Return it as it lies."""
        return self._tensor.reshape(-1)

    def whole(self) -> torch.Tensor:
        """Return it as it lies."""
        return self._tensor


class RowShard:
    """This rank's rows of a parameter that `torch.distributed.fsdp.fully_shard` has sharded.

    FSDP2 cuts the first dimension as `torch.chunk` does: equal parts, the last ones smaller or empty. With replicas
    (HSDP) each of them holds the same rows.

    Raises:
        ConfigError: It is placed in another way.
    """

    is_in_place = True

    def __init__(self, name: str, tensor: DTensor) -> None:
        sharded = [index for index, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
        # `type`, since a strided shard is a `Shard` too, and its rows are not one run.
        if len(sharded) > 1 or any(
            type(tensor.placements[index]) is not Shard or tensor.placements[index].dim != 0  # type: ignore[attr-defined]
            for index in sharded
        ):
            raise ConfigError(
                f"{name} is placed as {tensor.placements}, and only rows (Shard(0), with or without replicas) can be "
                "sent: shard with FSDP2's fully_shard alone, without tensor parallelism or shard_placement_fn."
            )
        self._tensor: Any = tensor.detach()
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        num_rows = self.shape[0] if self.shape else 1
        row = math.prod(self.shape[1:])
        start, stop = 0, num_rows
        for index in sharded:
            per_rank = -(-num_rows // tensor.device_mesh.size(index))
            start = min(num_rows, per_rank * tensor.device_mesh.get_local_rank(index))
            stop = min(num_rows, start + per_rank)
        self.interval = Interval(start * row, stop * row)

    def local(self) -> torch.Tensor:
        """Return the rows as they lie; nothing is gathered or copied."""
        local: torch.Tensor = self._tensor.to_local()
        return local.reshape(-1)[: self.interval.size]

    def whole(self) -> torch.Tensor:
        """Gather all rows."""
        # With CPU offload the rows lie where the mesh's backend cannot reach them.
        there = self._tensor.to(self._tensor.device_mesh.device_type)
        full: torch.Tensor = there.full_tensor()
        return full


class FlatShard:
    """This rank's partition of a parameter that DeepSpeed's ZeRO-3 has sharded.

    With p elements in each partition, partition r has the elements from r * p on; the last ones are padding. DeepSpeed
    keeps the partition current even of small parameters that it leaves gathered (`ds_persist`), so those are no
    exception, and neither are the second partitions of ZeRO++ (hpZ), which are copies.

    Raises:
        ConfigError: The partition is not in memory, or is quantised.
    """

    is_in_place = True

    def __init__(self, name: str, parameter: Any) -> None:
        partition = parameter.ds_tensor
        if getattr(getattr(partition, "status", None), "name", "AVAILABLE") != "AVAILABLE":
            raise ConfigError(
                f"{name} lies on NVMe, from where it cannot be sent. Use offload_param.device cpu or none in the "
                "DeepSpeed configuration."
            )
        if hasattr(partition, "ds_quant_scale"):
            raise ConfigError(
                f"{name} is quantised by ZeRO++, so no rank has its values. Set zero_quantized_weights to false."
            )
        self._parameter = parameter
        self._partition: torch.Tensor = partition.detach()
        self._size = int(getattr(partition, "ds_numel", partition.numel()))
        self._num_elements = int(parameter.ds_numel)
        self._group = parameter.ds_process_group
        self.shape = tuple(parameter.ds_shape)
        self.dtype: torch.dtype = partition.dtype
        start = min(self._num_elements, dist.get_rank(self._group) * self._size)
        self.interval = Interval(start, min(self._num_elements, start + self._size))

    def local(self) -> torch.Tensor:
        """Return the partition as it lies, without its padding; nothing is gathered or copied."""
        return self._partition.reshape(-1)[: self.interval.size]

    def whole(self) -> torch.Tensor:
        """Gather all partitions."""
        piece = self._partition.reshape(-1)[: self._size].to(self._parameter.device)
        gathered = piece.new_empty(self._size * dist.get_world_size(self._group))
        dist.all_gather_into_tensor(gathered, piece, group=self._group)
        return gathered[: self._num_elements].view(self.shape)


def address_of(tensor: Any) -> int:
    """Return where the elements that this rank holds of a parameter or buffer lie; 0 if it holds none."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    elif hasattr(tensor, "ds_id"):
        tensor = tensor.ds_tensor
    return int(tensor.data_ptr())


def value_of(name: str, tensor: torch.Tensor) -> Value:
    """Return what this rank holds of a parameter or buffer.

    Raises:
        ConfigError: It is sharded in a way that cannot be sent.
    """
    if isinstance(tensor, DTensor):
        return RowShard(name, tensor)
    if hasattr(tensor, "ds_id"):
        return FlatShard(name, tensor)
    return WholeTensor(tensor)
