"""Shoal's receiving end of the weight transfer, in each vLLM worker.

The trainer drives it over vLLM's own routes: `/init_weight_transfer_engine` once, then for each publish
`/start_weight_update`, `/update_weights`, `/finish_weight_update`. Tensors come over a process group that this worker
shares with the trainer; the slice plan and the digests go back through the store beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from shoal.types import ParameterMeta
from shoal.vllm_plugin.recorder import learn_plan
from shoal.vllm_plugin.sink import ParameterSink
from shoal.wire.plan import SlicePlan, dtype_from_name, metadata_from_json
from shoal.wire.rendezvous import WIRE_KEY, Group, GroupBackend, digest_key, join_store, make_group, plan_key


@dataclass
class ShoalInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """What a worker needs to meet the trainer.

    Attributes:
        host: Address of the trainer's store.
        port: Its port.
        own_host: Address of this engine's host that the trainer can reach.
        backend: `"nccl"` or `"gloo"`.
        world_size: Members of the group: the trainer (rank 0) and this engine's workers.
        timeout_s: For meeting and for each operation.
        engine: Name of the engine, for messages.
        parameters: `[[name, dtype, shape], ...]`, all that the trainer has.
    """

    host: str
    port: int
    own_host: str
    backend: GroupBackend
    world_size: int
    timeout_s: float
    engine: str
    parameters: list[Any]


@dataclass
class ShoalUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Which publish this is.

    Attributes:
        version: Version of the weights.
        attempt: Counts publishes, so that a repeated one does not read the digests of the one before.
    """

    version: int
    attempt: int


class ShoalWeightReceiver(WeightTransferEngine[ShoalInitInfo, ShoalUpdateInfo]):  # type: ignore[misc]
    """Receives full parameters by broadcast, keeps this worker's slices, and leaves digests of what it holds."""

    init_info_cls = ShoalInitInfo
    update_info_cls = ShoalUpdateInfo

    def init_transfer_engine(self, init_info: ShoalInitInfo) -> None:
        """Learn the slice plan, hand it to the trainer, and join its group."""
        self.shutdown()
        parallel = self.parallel_config
        self._rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._wire: tuple[ParameterMeta, ...] | None = None
        self._plan: SlicePlan = learn_plan(
            self.model,
            metadata_from_json(init_info.parameters),
            worker=f"{init_info.engine} worker {self._rank - 1}",
        )
        self._store = join_store(init_info.host, init_info.port, init_info.timeout_s)
        self._store.set(plan_key(self._rank), self._plan.to_json())
        self._group: Group | None = make_group(
            self._store,
            backend=init_info.backend,
            host=init_info.own_host,
            rank=self._rank,
            size=init_info.world_size,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        """Do nothing: each update is whole, and leaves no state behind when it fails."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one whole set of weights. (The base class's version synchronises an accelerator; a CPU is none.)"""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ShoalUpdateInfo) -> None:
        """Receive every parameter in turn and leave the digests for the trainer."""
        sink = ParameterSink(self.model, self._plan)
        try:
            for name, value in self._arriving():
                sink.write(name, value)
            digests = sink.finish()
        finally:
            sink.close()
        self._store.set(digest_key(update_info.version, update_info.attempt, self._rank), json.dumps(digests))

    def finish_weight_update(self) -> None:
        """Do nothing: `receive_weights` returns when the weights are in place."""

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Refuse: vLLM 0.26 declares this abstract; Shoal sends with `shoal.weights`."""
        raise NotImplementedError("Shoal sends weights with shoal.weights, not through vLLM's trainer side")

    def _arriving(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._group is None:
            raise RuntimeError("/init_weight_transfer_engine has not been called")
        if self._wire is None:
            self._wire = metadata_from_json(json.loads(self._store.get(WIRE_KEY)))
        options = dist.BroadcastOptions()
        options.rootRank = 0
        for meta in self._wire:
            value = torch.empty(meta.shape, dtype=dtype_from_name(meta.dtype), device=self.device)
            self._group.broadcast([value], options).wait()
            yield meta.name, value
