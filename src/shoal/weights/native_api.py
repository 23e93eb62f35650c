"""vLLM's own packed NCCL update, from the trainer's side, over its control routes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shoal import vllm_compat
from shoal.types import ParameterMeta
from shoal.weights.control import ControlClient
from shoal.wire.plan import dtype_name

SendWeights = Callable[[], None]
"""Starts an update, sends all weights and finishes the update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """What is sent.

    Attributes:
        parameters: All of it, in order.
        tensors: Yields each parameter's name and value, whole, on the current GPU, in this order.
    """

    parameters: Sequence[ParameterMeta]
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]


def outgoing_of(model: nn.Module) -> Outgoing:
    """Return all parameters of a plain model, as they lie."""
    parameters = [(name, value.detach()) for name, value in model.named_parameters()]
    return Outgoing(
        parameters=[
            ParameterMeta(name=name, dtype=dtype_name(value.dtype), shape=tuple(value.shape))
            for name, value in parameters
        ],
        tensors=lambda: iter(parameters),
    )


class FanOut:
    """All engines as one: what vLLM calls a weight-sync client.

    Args:
        clients: One for each engine.
        num_workers: Of each engine. In the group they follow the trainer, in this order.
        timeout_s: For each call.
    """

    def __init__(self, clients: Sequence[ControlClient], num_workers: Sequence[int], timeout_s: float) -> None:
        self._clients = tuple(clients)
        self._num_workers = tuple(num_workers)
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(max_workers=len(self._clients), thread_name_prefix="native update")

    @property
    def group_size(self) -> int:
        """Members of the group: the trainer, and all workers."""
        return 1 + sum(self._num_workers)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have all workers join the group."""
        offsets = [1 + sum(self._num_workers[:index]) for index in range(len(self._clients))]
        self._post(
            "/init_weight_transfer_engine", [{"init_info": init_info | {"rank_offset": offset}} for offset in offsets]
        )

    def shutdown_weight_transfer_engine(self) -> None:
        """Do nothing: who joins next takes the place."""

    def start_weight_update(self) -> None:
        """Open an update."""
        self.post_all("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Have the engines receive."""
        self.post_all("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update."""
        self.post_all("/finish_weight_update")

    def post_all(self, path: str, body: dict[str, Any] | None = None) -> None:
        """Call a route of every engine, side by side."""
        self._post(path, [body] * len(self._clients))

    def close(self) -> None:
        """Give the threads back, without waiting for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _post(self, path: str, bodies: Sequence[dict[str, Any] | None]) -> None:
        calls = [
            self._threads.submit(client.post, path, body, self._timeout_s)
            for client, body in zip(self._clients, bodies, strict=True)
        ]
        for call in calls:
            call.result()


def connect_native(engines: FanOut, outgoing: Outgoing, *, host: str, port: int) -> SendWeights:
    """Form vLLM's group with all workers and return what updates them. Blocks until all have joined.

    Args:
        engines: The engines, started with vLLM's `nccl` backend.
        outgoing: What is sent.
        host: Address of this host that the engines can reach.
        port: A free one there, for the meeting.
    """
    meeting: Mapping[str, Any] = {"master_address": host, "master_port": port, "world_size": engines.group_size}
    return vllm_compat.connect_native_update(engines, outgoing.parameters, outgoing.tensors, meeting)
