"""Shoal's receiving end of the weight transfer, in each vLLM worker. Tensors come straight from all trainer ranks."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shoal import vllm_compat
from shoal.protocols import Parcel, Pending, WeightTransport
from shoal.types import ParameterMeta
from shoal.vllm_plugin.adapter_plan import adapter_tensors, learn_adapter_plan
from shoal.vllm_plugin.recorder import learn_plan
from shoal.vllm_plugin.sink import ParameterSink
from shoal.wire.agreement import ADAPTER, Agreement, Cargo, Verify, device_identity, done_key, gave_up_key
from shoal.wire.plan import SlicePlan, metadata_from_json
from shoal.wire.rendezvous import join_store, local_address
from shoal.wire.schedule import Message, assign, batches, messages, num_ahead
from shoal.wire.transport import Backend, make_transport


@dataclass(frozen=True, slots=True, kw_only=True)
class MeetInfo:
    """What a worker needs to meet the trainer.

    Attributes:
        host: Address of the trainer's store.
        port: Its port.
        backend: What carries tensors.
        num_ranks: Trainer ranks; they come first in the group.
        num_workers: Of this engine; they follow.
        timeout_s: For meeting and for each operation.
        engine: Name of the engine, for messages.
        cargoes: For each kind of publish, `[[name, dtype, shape], ...]`: all that the trainer has of it.
    """

    host: str
    port: int
    backend: Backend
    num_ranks: int
    num_workers: int
    timeout_s: float
    engine: str
    cargoes: dict[Cargo, list[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveInfo:
    """Which publish this is.

    Attributes:
        attempt: Its number.
        cargo: What is sent.
        verify: `"full"`: send back what was received. `"off"`: no digests are wanted.
    """

    attempt: int
    cargo: Cargo
    verify: Verify


@dataclass(frozen=True, slots=True)
class _Intake:
    """Where one cargo goes.

    Attributes:
        parameters: All that the trainer has.
        plan: This worker's.
        sink: Takes the pieces.
        batches: What arrives, batch by batch; empty until the trainer has said who sends what.
        rooms: For batches that only ever go to where they stay, the places: views that are made once.
    """

    parameters: tuple[ParameterMeta, ...]
    plan: SlicePlan
    sink: ParameterSink
    batches: list[tuple[Message, ...]]
    rooms: dict[int, list[torch.Tensor]]


class WeightReceiver:
    """One worker's line to one trainer: receives its slices, in place where possible, and digests what it holds.

    Args:
        model: The worker's part of the model.
        device: Where that lies.
        worker: Number of this worker within its engine.
        info: How to meet the trainer.
    """

    def __init__(self, model: nn.Module, *, device: torch.device, worker: int, info: MeetInfo) -> None:
        self._model = model
        self._device = device
        self._worker = worker
        self._info = info
        self._store = join_store(info.host, info.port, info.timeout_s)
        self._intakes = {cargo: self._make_intake(cargo, items) for cargo, items in info.cargoes.items()}
        self._transport: WeightTransport | None = None

    def introduce(self) -> dict[str, Any]:
        """Return what the trainer must know of this worker: its slice plans and its device."""
        return {
            "plans": {cargo: intake.plan.to_json() for cargo, intake in self._intakes.items()},
            "device": device_identity(self._device),
        }

    def join(self, agreements: dict[Cargo, Agreement]) -> None:
        """Join the group that brings what was agreed. Blocks until all members do."""
        for cargo, agreement in agreements.items():
            self._intakes[cargo].batches[:] = _schedule(self._intakes[cargo], agreement, self._worker)
        info = self._info
        self._transport = make_transport(
            self._store,
            backend=info.backend,
            rank=info.num_ranks + self._worker,
            num_trainers=info.num_ranks,
            num_workers=info.num_workers,
            host=local_address(info.host),
            device=self._device,
            timeout_s=info.timeout_s,
        )

    def receive(self, info: ReceiveInfo) -> list[int]:
        """Receive one whole cargo; return a digest of each slice of its plan, of what then lies in its place."""
        transport = self._transport
        if transport is None:
            raise RuntimeError("this worker has not joined a weight group")
        intake = self._intakes[info.cargo]
        self._synchronize()  # a step that is still under way reads the former weights
        intake.sink.begin(with_digests=info.verify != "off")
        try:
            self._take_all(transport, intake, info.verify)
            transport.finish(self._info.timeout_s)
            digests = intake.sink.finish()
        except Exception:
            with suppress(dist.DistError):  # the trainer may be what has failed
                self._store.set(gave_up_key(self._worker), str(info.attempt))
            raise
        finally:
            intake.sink.close()
        self._synchronize()
        self._store.set(done_key(self._worker), str(info.attempt))
        return digests

    def close(self) -> None:
        """Leave the group."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def _make_intake(self, cargo: Cargo, items: list[Any]) -> _Intake:
        parameters = metadata_from_json(items)
        name = f"{self._info.engine} worker {self._worker}"
        if cargo == ADAPTER:
            plan = learn_adapter_plan(self._model, parameters, worker=name)
            resolve = adapter_tensors(self._model).__getitem__
            return _Intake(parameters, plan, ParameterSink(self._model, plan, self._device, resolve), [], {})
        with vllm_compat.without_adapters(self._model):
            plan = learn_plan(self._model, parameters, worker=name)
            return _Intake(parameters, plan, ParameterSink(self._model, plan, self._device), [], {})

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    @staticmethod
    def _take_all(transport: WeightTransport, intake: _Intake, verify: Verify) -> None:
        """Receive what comes next while former batches are put in their places."""
        sink = intake.sink
        under_way: deque[tuple[int, tuple[Message, ...], list[torch.Tensor], Pending]] = deque()

        def settle(number: int, batch: tuple[Message, ...], rooms: list[torch.Tensor], pending: Pending) -> None:
            pending.wait()
            if rooms is not intake.rooms.get(number):
                for message, room in zip(batch, rooms, strict=True):
                    sink.place(message, room)
            if verify == "full":
                transport.send([Parcel(sink.held(message), message.rank) for message in batch]).wait()
            for message in batch:
                sink.settle(message)

        for number, batch in enumerate(intake.batches):
            rooms = intake.rooms.get(number)
            if rooms is None:
                rooms = [sink.room(message) for message in batch]
                if all(sink.stays(message, room) for message, room in zip(batch, rooms, strict=True)):
                    intake.rooms[number] = rooms
            parcels = [Parcel(room, message.rank) for message, room in zip(batch, rooms, strict=True)]
            pending = transport.receive(parcels)
            under_way.append((number, batch, rooms, pending))
            while len(under_way) > num_ahead(is_kept=number in intake.rooms, goes_back=verify == "full"):
                settle(*under_way.popleft())
        for received in under_way:
            settle(*received)


def _schedule(intake: _Intake, agreement: Agreement, worker: int) -> list[tuple[Message, ...]]:
    """Work out what arrives at this worker. All sides go through the same batches, also those with nothing for it."""
    wanted = [meta for meta in intake.parameters if meta.name in agreement.wanted]
    ownership = assign(intake.parameters, agreement.holdings, agreement.preferred[worker])
    return [
        tuple(message for part in parts for message in messages(intake.plan, ownership, part))
        for parts in batches(wanted, agreement.batch_bytes)
    ]
