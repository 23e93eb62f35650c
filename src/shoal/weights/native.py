"""Publish to engines without Shoal's plugin, by vLLM's own update: from rank 0, over NCCL, and with nothing proven."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from shoal.errors import ConfigError, EngineRequestError, WeightSyncError
from shoal.protocols import Ranks, WeightSource
from shoal.types import UNPROVEN, Interval, PublishReport
from shoal.weights.group import EngineAddress, PublishSettings
from shoal.weights.line import within
from shoal.weights.native_api import FanOut, Outgoing, SendWeights, connect_native
from shoal.wire.agreement import MODEL, Cargo
from shoal.wire.plan import SlicePlan, dtype_from_name
from shoal.wire.rendezvous import local_address

Connect = Callable[..., SendWeights]
T = TypeVar("T")


class NativePublisher:
    """What `WeightPublisher` is to engines with the plugin. All engines are in one group, and fail together.

    Args:
        sources: This rank's part of what is published: the whole model, of which rank 0 must hold everything.
        engines: On rank 0, all engines; elsewhere nothing.
        ranks: The other trainer ranks.
        device: Where this rank's weights lie.
        settings: How it works; nothing is verified.
        connect: Forms the group.

    Raises:
        ConfigError: The trainer's model is sharded.
    """

    plans: tuple[SlicePlan, ...] = ()
    """vLLM's update has none."""

    def __init__(
        self,
        sources: Mapping[Cargo, WeightSource],
        engines: Sequence[EngineAddress],
        *,
        ranks: Ranks,
        device: torch.device,
        settings: PublishSettings,
        connect: Connect = connect_native,
    ) -> None:
        self._outgoing = _whole(sources[MODEL])
        self._engines = tuple(engines)
        self._ranks = ranks
        self._device = device
        self._settings = settings
        self._connect = connect
        self._fan_out: FanOut | None = None
        self._send: SendWeights | None = None
        self._names: tuple[str, ...] = ()
        self.num_publishes = 0
        self.num_proven = 0

    @property
    def live_engines(self) -> tuple[str, ...]:
        """Names of all engines, on all ranks: none leaves the group alone."""
        return self._names

    def connect(self) -> None:
        """Meet every engine's workers.

        Raises:
            WeightSyncError: One did not come.
        """
        self._ranks.json(self._meet)
        self._names = tuple(self._ranks.json(lambda: [engine.client.name for engine in self._engines]))

    def leave(self, names: Collection[str]) -> None:
        """Refuse to go on without some of the engines.

        Raises:
            WeightSyncError: Always: vLLM's group holds all of them.
        """
        raise WeightSyncError(
            f"{', '.join(sorted(names))} cannot be left out: engines without Shoal's plugin receive weights all "
            "together. Start the engines with `shoal serve` to have the others go on."
        )

    def publish(self, version: int) -> PublishReport:
        """Send the current weights. The engines are paused meanwhile, and go on afterwards in any case.

        Raises:
            WeightSyncError: It failed; what the engines hold is not known.
        """
        self.num_publishes += 1
        began = time.monotonic()
        self._ranks.json(lambda: self._publish(version))
        num_workers = self._ranks.json(lambda: sum(engine.num_workers for engine in self._engines))
        return PublishReport(
            version=version,
            num_workers=num_workers,
            num_digests=0,
            num_bytes=sum(
                meta.num_elements * dtype_from_name(meta.dtype).itemsize for meta in self._outgoing.parameters
            ),
            lost={},
            seconds=time.monotonic() - began,
        )

    def close(self) -> None:
        """Leave the group, without waiting for anyone."""
        self._send = None
        if self._fan_out is not None:
            self._fan_out.close()

    def _meet(self) -> None:
        limit = self._settings.timeout_s
        fan_out = FanOut(
            [engine.client for engine in self._engines], [engine.num_workers for engine in self._engines], limit
        )
        self._fan_out = fan_out
        host = self._settings.host or local_address(self._engines[0].host)

        def connect() -> SendWeights:
            self._use_device()
            return self._connect(fan_out, self._outgoing, host=host, port=_free_port(host))

        self._send = self._call(connect, "vLLM's own weight group to form")

    def _publish(self, version: int) -> None:
        send, fan_out = self._send, self._fan_out
        if send is None or fan_out is None:
            raise WeightSyncError("no engine has been met: call connect() before publish()")

        def pause_and_send() -> None:
            self._use_device()
            fan_out.post_all("/pause?mode=keep&clear_cache=false")
            send()

        for engine in self._engines:
            engine.client.weight_version = UNPROVEN
        try:
            self._call(pause_and_send, "vLLM's own weight update")
        finally:
            self._resume(fan_out)
        salt = secrets.token_hex(8)
        for engine in self._engines:
            engine.client.weight_version = version
            engine.client.cache_salt = salt

    def _resume(self, fan_out: FanOut) -> None:
        try:
            fan_out.post_all("/resume")
        except EngineRequestError as error:
            raise WeightSyncError(f"an engine could not go on after a publish: {error}") from error

    def _call(self, function: Callable[[], T], what: str) -> T:
        """Do what cannot be interrupted, and leave it behind if it takes too long."""
        try:
            return within(self._settings.timeout_s, function, what)
        except WeightSyncError:
            raise
        except Exception as error:
            raise WeightSyncError(f"{what} failed: {type(error).__name__}: {error}") from error

    def _use_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a choice of each thread


def _whole(source: WeightSource) -> Outgoing:
    """Return all of a source, which must hold every parameter whole.

    Raises:
        ConfigError: It does not.
    """
    metas, held = source.metadata(), source.held()
    for meta in metas:
        if held.get(meta.name) != Interval(0, meta.num_elements):
            raise ConfigError(
                f"{meta.name} is sharded over the trainer's ranks, and vLLM's own weight update, which engines without "
                "Shoal's plugin need, sends from one rank alone. Start the engines with `shoal serve`."
            )

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for meta, (name, value) in zip(metas, source.tensors(), strict=True):
            yield name, value.to(dtype_from_name(meta.dtype)).view(meta.shape)

    return Outgoing(parameters=metas, tensors=tensors)


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])
