"""All engines of a run: start them side by side, wait until each is ready, and end them together."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from shoal.engines.client import EngineClient
from shoal.engines.command import LOOPBACK, EngineSpec
from shoal.engines.handle import EngineHandle, Launch
from shoal.engines.process import launch_here
from shoal.errors import EngineError, EngineStartError

_POLL_S = 0.25

StartProgress = Callable[[Sequence[tuple[str, str]], float], None]
"""Called while engines start, with `(name, stage)` of each and the seconds so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagedEngine:
    """One running engine: what holds it and the client that talks to it."""

    process: EngineHandle
    client: EngineClient

    @property
    def name(self) -> str:
        """Short name."""
        return self.client.name

    @property
    def host(self) -> str:
        """Name or address at which this host reaches it."""
        return urlsplit(self.client.url).hostname or LOOPBACK

    @property
    def num_workers(self) -> int:
        """vLLM's worker processes."""
        return self.process.num_workers

    @property
    def spec(self) -> EngineSpec:
        """What was started; attached engines have none."""
        spec = self.process.spec
        assert spec is not None, "started by others"
        return spec

    @property
    def sleeps(self) -> bool:
        """Whether it gives its devices' memory back between publishes."""
        return self.process.spec is not None and self.process.spec.sleeps


class Fleet:
    """Engines that were started together and end together. Use as a context manager, or call `close`."""

    def __init__(self, engines: Sequence[ManagedEngine], api_key: str = "") -> None:
        self.engines = tuple(engines)
        self.api_key = api_key
        self._ended: set[str] = set()
        self._former: list[EngineClient] = []
        self._lock = threading.Lock()

    @classmethod
    def start(
        cls,
        specs: Sequence[EngineSpec],
        *,
        log_dir: Path,
        timeout_s: float,
        request_timeout_s: float,
        on_progress: StartProgress | None = None,
        launch: Launch = launch_here,
    ) -> Fleet:
        """Start every engine and wait until all are ready.

        Args:
            specs: One for each engine.
            log_dir: Each engine writes to `<log_dir>/<name>.log`.
            timeout_s: For all of them together.
            request_timeout_s: Longest that one completion may take later.
            on_progress: Told about once a second.
            launch: Starts them, on this host or elsewhere.

        Raises:
            EngineStartError: One ended, or was not ready in time. All have been ended by then.
        """
        api_key = secrets.token_hex(32)
        engines: list[ManagedEngine] = []
        fleet = cls((), api_key)
        try:
            for spec, (process, url) in zip(specs, launch(specs, api_key, log_dir), strict=True):
                client = EngineClient(
                    name=spec.name,
                    url=url,
                    api_key=api_key,
                    log_path=process.log_path,
                    request_timeout_s=request_timeout_s,
                    model=spec.request_model,
                    has_plugin=True,
                )
                engines.append(ManagedEngine(process=process, client=client))
                fleet.engines = tuple(engines)
            fleet._wait_ready(fleet.engines, timeout_s, on_progress)
        except BaseException:
            fleet.close()
            raise
        return fleet

    def check_alive(self) -> None:
        """Raise if an engine has ended by itself.

        Raises:
            EngineError: Naming the engine, why it died and its log file.
        """
        for engine in self.engines:
            if engine.name not in self._ended and (why := self.why_ended(engine.name)) is not None:
                raise EngineError(f"{engine.name} {why}")

    def why_ended(self, name: str) -> str | None:
        """Return with which status an engine's process has ended, why, and where its log is; None while it runs."""
        process = self._named(name).process
        status = process.exit_status()
        if status is None:
            return None
        log = f" (see {process.log_path})" if process.log_path is not None else ""
        return f"ended with status {status}: {process.why_it_died()}{log}"

    def end(self, name: str) -> None:
        """End one engine, without waiting for it; the others run on."""
        self._ended.add(name)
        self._named(name).process.ask_to_end()

    def restart(self, name: str, *, timeout_s: float, stop: threading.Event) -> ManagedEngine:
        """Start an engine anew that was lost, and wait until its server answers. What is left of it is ended first.

        The others may be used meanwhile, and several may be restarted at once.

        Args:
            name: Of the engine.
            timeout_s: How long its start may take.
            stop: Set to give the attempt up.

        Raises:
            EngineStartError: It ended, was not ready in time, or is not wanted any more. It has been ended by then.
        """
        former = self._named(name)
        process, url = former.process.start_again()
        self._former.append(former.client)  # closed at the end: a publish may be about to learn that it answers no more
        engine = ManagedEngine(process=process, client=former.client.for_next_life(url, process.log_path))
        with self._lock:
            self.engines = tuple(engine if other.name == name else other for other in self.engines)
        try:
            self._wait_ready([engine], timeout_s, stop=stop)
        except BaseException:
            process.ask_to_end()
            process.wait_ended()
            raise
        self._ended.discard(name)
        return engine

    def close(self) -> None:
        """End every engine and wait until nothing of them is left. Calling it again does nothing."""
        for engine in self.engines:
            engine.process.ask_to_end()
        for engine in self.engines:
            engine.process.wait_ended()
            engine.client.close()
        for client in self._former:
            client.close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _named(self, name: str) -> ManagedEngine:
        return next(engine for engine in self.engines if engine.name == name)

    @staticmethod
    def _wait_ready(
        engines: Sequence[ManagedEngine],
        timeout_s: float,
        on_progress: StartProgress | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        began = time.monotonic()
        told = began
        waiting = list(engines)
        while waiting:
            if stop is not None and stop.is_set():
                raise EngineStartError(f"{waiting[0].name} was not waited for: the run has ended")
            for engine in waiting:
                if (status := engine.process.exit_status()) is not None:
                    raise EngineStartError(
                        f"{engine.name} could not start (status {status}): {engine.process.why_it_died()}\n"
                        f"Its whole output is in {engine.process.log_path}."
                    )
            waiting = [engine for engine in waiting if not engine.client.is_healthy()]
            now = time.monotonic()
            if waiting and now - began > timeout_s:
                stages = "; ".join(f"{engine.name}: {engine.process.stage()}" for engine in waiting)
                raise EngineStartError(
                    f"{', '.join(engine.name for engine in waiting)} not ready after {timeout_s:g} s ({stages}). "
                    f"Raise vllm_startup_timeout_s, or see {waiting[0].process.log_path}."
                )
            if on_progress is not None and (now - told >= 1.0 or not waiting):
                told = now
                names = {engine.name for engine in waiting}
                stages_now = [
                    (engine.name, engine.process.stage() if engine.name in names else "ready") for engine in engines
                ]
                on_progress(stages_now, now - began)
            if waiting:
                time.sleep(_POLL_S)
