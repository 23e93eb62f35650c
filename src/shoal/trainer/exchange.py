"""What rank 0 tells the other ranks: a step's sequences, or that it failed. Tensors and plain bytes, never pickles."""

from __future__ import annotations

import json
from collections import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shoal.data.table import TableSizes, empty_table, sequences_from_table, table_from_sequences
from shoal.errors import ShoalError
from shoal.types import Sequence

DEFAULT_TIMEOUT_S = 1800.0  # torch's own, of process groups


class RankZeroFailedError(ShoalError):
    """Rank 0 failed; this is raised on all other ranks, so that none waits for it. Rank 0 raises its own error."""


class RankLostError(ShoalError):
    """Another trainer rank has ended, or does not come to where it is waited for."""


class Exchange:
    """Broadcasts from rank 0. Every method is a collective, as is making one: all ranks, in the same order.

    All of it goes from host to host over Gloo: a rank that waited in a collective of NCCL while completions are
    written would have a kernel spin on its GPU, which an engine may share.

    A rank that ends meanwhile is a `RankLostError` on the others.

    Args:
        rank: Of this process.
        world_size: Number of trainer processes; with one, nothing is sent. With more, torch's default process group
            is there.
        timeout_s: How long ranks wait for one another, at most.

    Raises:
        RankLostError: The ranks' hosts do not reach one another over Gloo.
    """

    def __init__(self, *, rank: int, world_size: int, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._rank = rank
        self._is_alone = world_size == 1
        self._world_size = world_size
        self._group = None if self._is_alone else _gloo_group(timeout_s)

    @property
    def rank(self) -> int:
        """Of this process."""
        return self._rank

    @property
    def num_ranks(self) -> int:
        """Trainer processes."""
        return self._world_size

    def sequences(self, make: Callable[[], abc.Sequence[Sequence]]) -> list[Sequence]:
        """Call `make` on rank 0 and return its sequences on all ranks.

        Raises:
            RankZeroFailedError: On the other ranks, when `make` raised; rank 0 raises what it raised.
        """
        if self._is_alone:
            return list(make())
        # Laid out inside, so that sequences which do not fit a table fail on all ranks.
        table = self._on_rank_zero(lambda: table_from_sequences(make()))
        sizes = table.sizes if table is not None else TableSizes(num_sequences=0, num_tokens=0, num_completion_tokens=0)
        header = torch.tensor([sizes.num_sequences, sizes.num_tokens, sizes.num_completion_tokens])
        self._broadcast(header)
        counts = [int(count) for count in header.tolist()]
        room = empty_table(TableSizes(num_sequences=counts[0], num_tokens=counts[1], num_completion_tokens=counts[2]))
        for index, tensor in enumerate(room.tensors):
            if table is not None:
                tensor.copy_(table.tensors[index])
            # Gloo does not send bool.
            self._broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor)
        return sequences_from_table(room)

    def json(self, make: Callable[[], Any]) -> Any:
        """Call `make` on rank 0 and return its value, of plain JSON types, on all ranks.

        Raises:
            RankZeroFailedError: As for `sequences`.
        """
        if self._is_alone:
            return make()
        # Encoded inside, so that a value which is not JSON fails on all ranks instead of leaving the others waiting.
        text = self._on_rank_zero(lambda: json.dumps(make()))
        return json.loads(self._bytes(text.encode() if text is not None else b""))

    def gather_json(self, value: Any) -> list[Any]:
        """Return every rank's value, of plain JSON types, on all ranks."""
        if self._is_alone:
            return [json.loads(json.dumps(value))]
        payload = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self._world_size)]
        with _meeting_ranks():
            dist.all_gather(sizes, torch.tensor([len(payload)]), group=self._group)
        # Of one size for all: Gloo does not gather tensors of several.
        longest = max(int(size) for size in sizes)
        room = torch.zeros(longest, dtype=torch.uint8)
        room[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        rooms = [torch.empty_like(room) for _ in range(self._world_size)]
        with _meeting_ranks():
            dist.all_gather(rooms, room, group=self._group)
        return [json.loads(bytes(gathered[: int(size)].numpy())) for gathered, size in zip(rooms, sizes, strict=True)]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks of int64 values, modulo 2^64, on all ranks."""
        if self._is_alone:
            return values
        total = values.to("cpu", copy=True)
        with _meeting_ranks():
            dist.all_reduce(total, group=self._group)
        return total

    def _on_rank_zero(self, make: Callable[[], Any]) -> Any:
        """Call `make` on rank 0; let every rank know whether it worked before any goes on."""
        value: Any = None
        failure: BaseException | None = None
        if self._rank == 0:
            try:
                value = make()
            except BaseException as error:
                failure = error
        text = f"{type(failure).__name__}: {failure}" if failure is not None else ""
        message = self._bytes(text.encode(errors="replace"))
        if failure is not None:
            raise failure
        if message:
            raise RankZeroFailedError(f"rank 0 failed, see its output: {message.decode(errors='replace')}")
        return value

    def _bytes(self, payload: bytes) -> bytes:
        size = torch.tensor([len(payload)])
        self._broadcast(size)
        if int(size) == 0:
            return b""
        room = torch.empty(int(size), dtype=torch.uint8)
        if self._rank == 0:
            room.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        self._broadcast(room)
        return bytes(room.numpy())

    def _broadcast(self, tensor: torch.Tensor) -> None:
        with _meeting_ranks():
            dist.broadcast(tensor, src=0, group=self._group)


def _gloo_group(timeout_s: float) -> dist.ProcessGroup | None:
    """Return all ranks' group between CPUs; None for the default one if it is such a group."""
    if "cpu:gloo" in dist.get_backend_config():
        return None
    try:
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise RankLostError(
            "the trainer processes do not reach one another over TCP. If they are on several hosts, name the network "
            f"interface between these in GLOO_SOCKET_IFNAME, such as eth0. ({error})"
        ) from error
    return group


@contextmanager
def _meeting_ranks() -> Iterator[None]:
    """Say in our own terms what torch says of a peer's socket."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(
            f"another trainer rank has ended, or did not come in time; its own output says why ({error})"
        ) from error
