"""vLLM's own packed NCCL update, from the trainer's side: the two forms that it has had from vLLM 0.26 on.

First `packed` travelled with every update and the trainer called plain functions; later it came with the handshake, and
the trainer holds an engine of its own. Which one is there is seen from what the module offers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from shoal.engines.client import EngineClient
from shoal.engines.command import LOOPBACK
from shoal.wire.plan import dtype_name

_TIMEOUT_S = 300.0

SendWeights = Callable[[], None]
"""Starts an update, sends all weights and finishes the update."""


class FanOut:
    """All engines as one: what vLLM calls a weight-sync client.

    Args:
        clients: One for each engine.
        workers_per_engine: Each engine's workers follow the former's in the group.
    """

    def __init__(self, clients: Sequence[EngineClient], workers_per_engine: int) -> None:
        self._clients = tuple(clients)
        self._workers_per_engine = workers_per_engine
        self._threads = ThreadPoolExecutor(max_workers=len(self._clients))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have all workers join the group."""
        offsets = [1 + index * self._workers_per_engine for index in range(len(self._clients))]
        self._post(
            "/init_weight_transfer_engine", [{"init_info": init_info | {"rank_offset": offset}} for offset in offsets]
        )

    def shutdown_weight_transfer_engine(self) -> None:
        """Do nothing: the engines are ended as a whole."""

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

    def _post(self, path: str, bodies: Sequence[dict[str, Any] | None]) -> None:
        calls = [
            self._threads.submit(client.post, path, body, _TIMEOUT_S)
            for client, body in zip(self._clients, bodies, strict=True)
        ]
        for call in calls:
            call.result()


def connect_native(engines: FanOut, model: nn.Module, *, port: int, num_workers: int) -> SendWeights:
    """Form vLLM's group with all workers and return what updates them.

    Args:
        engines: The engines, started with vLLM's `nccl` backend.
        model: What is sent, from the current GPU.
        port: A free one, for the meeting.
        num_workers: Of all engines.
    """
    from vllm.distributed.weight_transfer import nccl_engine

    meeting = {"master_address": LOOPBACK, "master_port": port, "world_size": 1 + num_workers}
    if hasattr(nccl_engine, "NCCLTrainerWeightTransferEngine"):
        return _stateful(nccl_engine, engines, model, meeting)
    return _by_functions(nccl_engine.NCCLWeightTransferEngine, engines, model, meeting)


def _stateful(module: Any, engines: FanOut, model: nn.Module, meeting: dict[str, Any]) -> SendWeights:
    from vllm.distributed.weight_transfer.base import ModuleSource

    init_info = module.NCCLTrainerInitInfo(rank=0, packed=True, **meeting)
    sender = module.NCCLTrainerWeightTransferEngine.trainer_init(init_info, client=engines, source=ModuleSource(model))
    send: SendWeights = sender.send_weights
    return send


def _by_functions(engine: Any, engines: FanOut, model: nn.Module, meeting: dict[str, Any]) -> SendWeights:
    parameters = [(name, value.detach()) for name, value in model.named_parameters()]
    update_info = {
        "names": [name for name, _ in parameters],
        "dtype_names": [dtype_name(value.dtype) for _, value in parameters],
        "shapes": [list(value.shape) for _, value in parameters],
        "packed": True,
    }
    threads = ThreadPoolExecutor(max_workers=1)
    joining = threads.submit(engines.init_weight_transfer_engine, meeting)
    group = engine.trainer_init(meeting)
    joining.result()

    def send() -> None:
        engines.start_weight_update()
        updating = threads.submit(engines.update_weights, update_info)
        engine.trainer_send_weights(iter(parameters), {"group": group, "packed": True})
        torch.cuda.synchronize()
        updating.result()
        engines.finish_weight_update()

    return send
