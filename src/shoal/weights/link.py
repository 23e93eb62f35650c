"""The trainer's end of the line to one engine: its workers' group, their slice plans and their digests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from shoal.errors import EngineRequestError, WeightSyncError
from shoal.types import ParameterMeta
from shoal.wire.plan import SlicePlan, metadata_to_json
from shoal.wire.rendezvous import WIRE_KEY, Group, GroupBackend, digest_key, host_store, make_group, plan_key


class ControlClient(Protocol):
    """What a link needs of an engine's client."""

    weight_version: int

    @property
    def name(self) -> str:
        """Short name."""
        ...

    def post(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        """Call a control route."""
        ...


class EngineLink:
    """A process group of the trainer (rank 0) and one engine's workers. One engine's failure touches no other.

    Args:
        client: Drives the engine's control routes.
        num_workers: Of the engine.
        backend: What carries the tensors.
        host: Address of this process that the engine can reach, and of the engine that this process can.
        timeout_s: For each step.
    """

    def __init__(
        self, client: ControlClient, *, num_workers: int, backend: GroupBackend, host: str, timeout_s: float
    ) -> None:
        self.client = client
        self.num_workers = num_workers
        self._backend: GroupBackend = backend
        self._host = host
        self._timeout_s = timeout_s
        self._store = host_store(host, timeout_s)
        self._group: Group | None = None
        self.plans: tuple[SlicePlan, ...] = ()

    def connect(self, parameters: Sequence[ParameterMeta]) -> None:
        """Meet the engine's workers and receive their slice plans.

        Raises:
            WeightSyncError: They did not come, or could not plan.
        """
        init_info = {
            "host": self._host,
            "port": self._store.port,
            "own_host": self._host,
            "backend": self._backend,
            "world_size": 1 + self.num_workers,
            "timeout_s": self._timeout_s,
            "engine": self.client.name,
            "parameters": metadata_to_json(parameters),
        }

        def meet() -> Group:
            return make_group(
                self._store,
                backend=self._backend,
                host=self._host,
                rank=0,
                size=1 + self.num_workers,
                timeout_s=self._timeout_s,
            )

        meeting = AbandonableCall(meet)
        self.control("/init_weight_transfer_engine", {"init_info": init_info})
        self._group = meeting.result(self._timeout_s, f"{self.client.name} to join the weight group")
        self.plans = tuple(
            SlicePlan.from_json(self._fetch(plan_key(rank), "its slice plan", rank))
            for rank in range(1, 1 + self.num_workers)
        )

    def announce(self, wire: Sequence[ParameterMeta]) -> None:
        """Tell the workers what will be sent: the parameters in order, in the types in which they travel."""
        self._store.set(WIRE_KEY, json.dumps(metadata_to_json(wire)))

    def send(self, value: torch.Tensor) -> dist.Work:
        """Start sending one tensor to every worker of the engine."""
        if self._group is None:
            raise WeightSyncError(f"{self.client.name} has not joined the weight group")
        options = dist.BroadcastOptions()
        options.rootRank = 0
        work: dist.Work = self._group.broadcast([value], options)
        return work

    def digests(self, version: int, attempt: int) -> list[list[int]]:
        """Return each worker's digests of one publish, in the order of its plan.

        Raises:
            WeightSyncError: A worker left none within the time-out.
        """
        return [
            [int(value) for value in json.loads(self._fetch(digest_key(version, attempt, rank), "its digests", rank))]
            for rank in range(1, 1 + self.num_workers)
        ]

    def control(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Call a control route of the engine and return its answer.

        Raises:
            WeightSyncError: It failed or timed out.
        """
        try:
            return self.client.post(path, body, self._timeout_s)
        except EngineRequestError as error:
            raise WeightSyncError(f"publishing weights to {self.client.name} failed at {path}: {error}") from error

    def drop_prefix_cache(self) -> None:
        """Have the engine forget the keys and values that the former weights computed.

        Raises:
            WeightSyncError: It could not, as when requests are under way.
        """
        answer = self.control("/reset_prefix_cache")
        if isinstance(answer, dict) and answer.get("success") is False:
            raise WeightSyncError(
                f"{self.client.name} could not drop its prefix cache, so it would go on with keys and values of the "
                "former weights. It does this while requests are under way: publish when none are."
            )

    def close(self) -> None:
        """Leave the group, without waiting for the engine, which may be gone."""
        group, self._group = self._group, None
        if group is not None and self._backend == "nccl":
            group.shutdown()

    def _fetch(self, key: str, what: str, rank: int) -> str:
        try:
            self._store.wait([key], timedelta(seconds=self._timeout_s))
        except dist.DistStoreError as error:
            raise WeightSyncError(
                f"{self.client.name} worker {rank - 1} did not send {what} within {self._timeout_s:g} s "
                "(weight_sync_timeout_s)"
            ) from error
        return str(self._store.get(key).decode())


class AbandonableCall:
    """A blocking call on a daemon thread, which is left behind if nobody fetches its result.

    A collective whose partner died cannot be interrupted from Python; the control call beside it decides instead.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True, name="weights")
        self._thread.start()

    @property
    def error(self) -> BaseException | None:
        """What it has raised so far."""
        return self._error

    def result(self, timeout_s: float, what: str) -> Any:
        """Wait for the value.

        Raises:
            WeightSyncError: It took longer than `timeout_s`.
        """
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise WeightSyncError(f"waited {timeout_s:g} s for {what} (weight_sync_timeout_s)")
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            self._value = function()
        except BaseException as error:
            self._error = error
