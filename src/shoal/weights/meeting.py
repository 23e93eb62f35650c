"""Meet every engine's workers: learn their slice plans, agree on who sends what, and connect to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

from shoal.errors import WeightSyncError
from shoal.protocols import Ranks, WeightSource
from shoal.weights.control import EngineControl
from shoal.weights.group import EngineAddress, EngineGroup, PublishSettings
from shoal.weights.line import LAST_WORDS_S, EngineLine
from shoal.weights.sender import WeightSender
from shoal.wire.agreement import Agreement, Cargo, device_identity, holdings_from_json, holdings_to_json
from shoal.wire.plan import SlicePlan, metadata_to_json
from shoal.wire.rendezvous import Store, host_store, is_own_address, join_store, local_address
from shoal.wire.schedule import Holdings

_T = TypeVar("_T")


class Meeting:
    """One meeting. Every trainer rank holds it, and calls `hold` together.

    Args:
        sources: This rank's part of what is published.
        engines: On rank 0, all engines; elsewhere nothing.
        controls: Theirs.
        ranks: The other trainer ranks.
        device: Where this rank's weights lie.
        settings: How publishes work.
        threads: For calls of engines.
    """

    def __init__(
        self,
        sources: Mapping[Cargo, WeightSource],
        engines: Sequence[EngineAddress],
        controls: Sequence[EngineControl],
        *,
        ranks: Ranks,
        device: torch.device,
        settings: PublishSettings,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._sources = sources
        self._engines = engines
        self._controls = controls
        self._ranks = ranks
        self._device = device
        self._settings = settings
        self._threads = threads
        self._lines: list[EngineLine] = []
        self._stores: list[tuple[str, Store]] = []  # on rank 0: for each engine, and where it is served
        self._holdings: dict[Cargo, tuple[Holdings, ...]] = {}

    def hold(self) -> EngineGroup:
        """Meet all engines.

        Raises:
            WeightSyncError: One did not come, or holds another model.
        """
        self._make_lines()
        try:
            return self._meet()
        except BaseException:
            for line in self._lines:
                line.close()
            raise

    def _meet(self) -> EngineGroup:
        introductions = self._ranks.json(self._introduce)
        devices = self._ranks.gather_json(device_identity(self._device))
        for line, workers in zip(self._lines, introductions, strict=True):
            line.prefer_own_device(devices, [worker["device"] for worker in workers])
        plans = {
            cargo: [
                tuple(SlicePlan.from_json(worker["plans"][cargo]) for worker in workers) for workers in introductions
            ]
            for cargo in self._sources
        }
        senders = {cargo: self._make_sender(cargo, source, plans[cargo]) for cargo, source in self._sources.items()}
        self._join(senders)
        return EngineGroup(
            ranks=self._ranks,
            settings=self._settings,
            threads=self._threads,
            controls=list(self._controls),
            lines=self._lines,
            senders=senders,
            plans=plans,
            live=list(range(len(self._lines))),
        )

    def _make_lines(self) -> None:
        """Serve a store for each engine on rank 0, and have every rank join it."""
        settings, ranks = self._settings, self._ranks

        def serve() -> list[list[Any]]:
            self._stores = [(host, host_store(host, settings.timeout_s)) for host in map(self._own_host, self._engines)]
            return [
                [engine.client.name, engine.host, host, store.port, engine.num_workers, engine.backend, engine.sleeps]
                for engine, (host, store) in zip(self._engines, self._stores, strict=True)
            ]

        for name, engine_host, host, port, num_workers, backend, sleeps in ranks.json(serve):
            if ranks.rank == 0:
                store = self._stores[len(self._lines)][1]
            else:
                store = join_store(host, int(port), settings.timeout_s)
                if not is_own_address(host):
                    host = local_address(engine_host)
            self._lines.append(
                EngineLine(
                    name,
                    store,
                    rank=ranks.rank,
                    num_ranks=ranks.num_ranks,
                    num_workers=num_workers,
                    backend=backend,
                    sleeps=sleeps,
                    host=host,
                    device=self._device,
                    timeout_s=settings.timeout_s,
                )
            )

    def _own_host(self, engine: EngineAddress) -> str:
        """Return the address at which an engine reaches this host.

        Raises:
            WeightSyncError: There is none, or the one that was set is another host's.
        """
        host = self._settings.host
        if host is not None and not is_own_address(host):
            raise WeightSyncError(
                f"weight_sync_host={host!r} is no address of this host, so engines could not reach the trainer there. "
                "Set one that `ip address` shows, or unset it."
            )
        try:
            return host or local_address(engine.host)
        except OSError as error:
            raise WeightSyncError(f"{engine.client.name} at {engine.host} cannot be reached: {error}") from error

    def _introduce(self) -> list[list[Any]]:
        """Have every engine's workers make their plans; return, for each engine, what each worker says of itself."""
        cargoes = {cargo: metadata_to_json(source.metadata()) for cargo, source in self._sources.items()}
        meetings = [
            self._threads.submit(
                control.call,
                "shoal_meet",
                host=host,
                port=store.port,
                backend=engine.backend,
                num_ranks=self._ranks.num_ranks,
                num_workers=engine.num_workers,
                timeout_s=self._settings.timeout_s,
                engine=engine.client.name,
                cargoes=cargoes,
            )
            for engine, control, (host, store) in zip(self._engines, self._controls, self._stores, strict=True)
        ]
        return self._all_of(meetings, "make its slice plans")

    def _make_sender(self, cargo: Cargo, source: WeightSource, plans: Sequence[Sequence[SlicePlan]]) -> WeightSender:
        held = self._ranks.gather_json(holdings_to_json(source.held()))
        self._holdings[cargo] = tuple(holdings_from_json(item) for item in held)
        return WeightSender(
            source,
            rank=self._ranks.rank,
            holdings=self._holdings[cargo],
            lines=self._lines,
            plans=plans,
            device=self._device,
            batch_bytes=self._settings.batch_bytes,
        )

    def _join(self, senders: Mapping[Cargo, WeightSender]) -> None:
        """Form all groups. Every rank learns of a failure before any raises."""
        joining = self._start_joining(senders)
        failure = ""
        try:
            for line in self._lines:
                line.join()
        except Exception as error:
            failure = str(error)
        failures = [said for said in self._ranks.gather_json(failure) if said]

        def on_rank_zero() -> None:
            if failures:
                # An engine that could not join says why, if it can.
                done, _ = wait(joining, LAST_WORDS_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                raise WeightSyncError(failures[0])
            self._all_of(joining, "join the weight group")

        self._ranks.json(on_rank_zero)

    def _start_joining(self, senders: Mapping[Cargo, WeightSender]) -> list[Future[list[Any]]]:
        """On rank 0: have every engine's workers join, once they are told who sends what."""

        def join(control: EngineControl, line: EngineLine) -> list[Any]:
            agreements = {
                cargo: Agreement(
                    wanted=sender.wanted,
                    holdings=self._holdings[cargo],
                    batch_bytes=self._settings.batch_bytes,
                    preferred=line.preferred,
                ).to_json()
                for cargo, sender in senders.items()
            }
            try:
                return control.call("shoal_join", agreements=agreements)
            except WeightSyncError:
                line.call_off()
                raise

        return [
            self._threads.submit(join, control, line)
            for control, line in zip(self._controls, self._lines, strict=False)
        ]

    def _all_of(self, futures: Sequence[Future[_T]], what: str) -> list[_T]:
        """Return every engine's answer."""
        limit = self._settings.timeout_s
        done, waiting = wait(futures, limit, FIRST_EXCEPTION)
        for future in done:
            future.result()
        for line, future in zip(self._lines, futures, strict=True):
            if future in waiting:
                raise WeightSyncError(f"{line.name} did not {what} within {limit:g} s (weight_sync_timeout_s)")
        return [future.result() for future in futures]
