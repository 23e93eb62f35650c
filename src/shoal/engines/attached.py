"""Engines that others have started: attach to them, and leave them as usable as they were."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from shoal.engines.attach_checks import Needs, check_server
from shoal.engines.client import EngineClient
from shoal.engines.command import EngineSpec
from shoal.engines.fleet import Fleet, ManagedEngine, StartProgress
from shoal.engines.probe import ServerFacts, probe
from shoal.errors import ConfigError, EngineStartError
from shoal.vllm_plugin.attach_routes import HOLD_PATH

logger = logging.getLogger(__name__)

_CONNECT_S = 10.0
_LEAVE_S = 5.0
_AGAIN_S = 30.0
_HANDOVER_S = 5.0
_POLL_S = 0.2
_MOST_AT_ONCE = 64


class AttachedEngine:
    """An `EngineHandle` of an engine that is not ours to end.

    Args:
        facts: What it says of itself.
        needs: What it must be able to do.
        api_key: Its key; None for a server without one.

    Raises:
        ConfigError: Another trainer holds it.
        EngineStartError: It does not answer.
    """

    def __init__(self, facts: ServerFacts, needs: Needs, api_key: str | None) -> None:
        self.facts = facts
        self._needs = needs
        self._api_key = api_key
        # A server without the plugin cannot be held: whoever has its key may use it beside this trainer.
        self._hold = Hold(facts.url, api_key or "") if facts.has_plugin else None
        self._resuming: threading.Thread | None = None
        self.log_path: Path | None = None
        self.spec: EngineSpec | None = None

    @property
    def has_plugin(self) -> bool:
        """Whether it was started with Shoal's plugin."""
        return self.facts.has_plugin

    @property
    def num_workers(self) -> int:
        """vLLM's worker processes."""
        return self.facts.num_workers

    def exit_status(self) -> int | None:
        """Return 1 once it has closed the connection that holds it."""
        return 1 if self._hold is not None and self._hold.is_broken() else None

    def why_it_died(self) -> str:
        """Say that there is no log to look into."""
        return f"the engine at {self.facts.url} closed its connection; its log is where it was started"

    def stage(self) -> str:
        """Say that it is waited for: it runs, or nobody would have attached to it."""
        return "not answering"

    def ask_to_end(self) -> None:
        """Leave it, not paused."""
        if self._hold is not None:
            self._hold.release()  # the engine then goes on by itself
        elif self._resuming is None:
            self._resuming = threading.Thread(target=self._resume, daemon=True, name="leave engine")
            self._resuming.start()

    def wait_ended(self) -> None:
        """Wait until it has been let go of."""
        if self._hold is not None:
            self._hold.wait_released()
        elif self._resuming is not None:
            self._resuming.join(2 * _LEAVE_S)

    def start_again(self) -> tuple[AttachedEngine, str]:
        """Attach anew, if whoever started the engine has started it again; return it, and its URL.

        Raises:
            EngineStartError: Nothing is there.
            ConfigError: What is there cannot serve this trainer.
        """
        self.ask_to_end()
        self.wait_ended()
        facts = probe(self.facts.url, self._api_key, _AGAIN_S)
        check_server(facts, self._needs)
        return AttachedEngine(facts, self._needs, self._api_key), facts.url

    def _resume(self) -> None:
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        with suppress(httpx.HTTPError):  # it may be gone, or busy; whoever started it sees to it
            httpx.post(f"{self.facts.url}/resume", headers=headers, timeout=_LEAVE_S, trust_env=False)


class Hold:
    """Keeps an engine for this trainer by a request that is never finished, and lets it go with the process.

    Args:
        url: The engine's.
        api_key: Its key.

    Raises:
        ConfigError: Another trainer holds it.
        EngineStartError: It does not answer.
    """

    def __init__(self, url: str, api_key: str) -> None:
        timeout = httpx.Timeout(_CONNECT_S, read=None)
        headers = {"Authorization": f"Bearer {api_key}"}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)
        self._is_released = threading.Event()
        try:
            self._response = self._ask(url)
        except BaseException:
            self._client.close()
            raise
        self._thread = threading.Thread(target=self._listen, daemon=True, name="attached engine")
        self._thread.start()

    def is_broken(self) -> bool:
        """Whether the engine has closed the connection."""
        return not self._thread.is_alive() and not self._is_released.is_set()

    def release(self) -> None:
        """Close the connection."""
        if self._is_released.is_set():
            return
        self._is_released.set()
        network: Any = self._response.extensions.get("network_stream")
        raw = network.get_extra_info("socket") if network is not None else None
        if raw is not None:
            with suppress(OSError):
                raw.shutdown(socket.SHUT_RDWR)  # ends the thread's read, which has no time-out

    def wait_released(self) -> None:
        """Wait until it is closed."""
        self._thread.join(_LEAVE_S)
        self._client.close()

    def _ask(self, url: str) -> httpx.Response:
        """Return the answer that goes on, once a trainer that has just ended has let go."""
        body = {"trainer": f"trainer {os.getpid()} on {socket.gethostname()}"}
        deadline = time.monotonic() + _HANDOVER_S
        while True:
            request = self._client.build_request("POST", HOLD_PATH, json=body, headers={"Connection": "close"})
            try:
                response = self._client.send(request, stream=True)
                if response.status_code == httpx.codes.OK:
                    return response
                text = response.read().decode(errors="replace")[:300]
            except httpx.HTTPError as error:
                raise EngineStartError(f"The engine at {url} did not answer {HOLD_PATH}: {error}") from error
            if response.status_code != httpx.codes.CONFLICT:
                raise EngineStartError(f"The engine at {url} answered {HOLD_PATH} with {response.status_code}: {text}")
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"The engine at {url} is held by another trainer, whose weights it serves: {text}. End that one, "
                    "or attach to other engines."
                )
            time.sleep(_POLL_S)

    def _listen(self) -> None:
        with suppress(httpx.HTTPError):
            for _ in self._response.iter_raw():
                if self._is_released.is_set():
                    return


def attach(
    urls: Sequence[str],
    api_key: str | None,
    needs: Needs,
    *,
    timeout_s: float,
    request_timeout_s: float,
    on_progress: StartProgress | None = None,
) -> Fleet:
    """Attach to running engines, as soon as all of them are ready.

    Args:
        urls: Of each engine.
        api_key: Of all of them; None where they have none.
        needs: What they must be able to do.
        timeout_s: For all of them together to become ready.
        request_timeout_s: Longest that one completion may take later.
        on_progress: Told once all are ready.

    Raises:
        EngineStartError: One did not become ready.
        ConfigError: One cannot serve this trainer.
    """
    with ThreadPoolExecutor(min(len(urls), _MOST_AT_ONCE)) as threads:
        facts = list(threads.map(lambda url: probe(url, api_key, timeout_s), urls))
    for fact in facts:
        check_server(fact, needs)
    if len({fact.has_plugin for fact in facts}) > 1:
        plain = ", ".join(fact.url for fact in facts if not fact.has_plugin)
        raise ConfigError(
            f"Some engines have Shoal's plugin and {plain} not: weights reach the two kinds in different ways. Start "
            "all of them with `shoal serve`."
        )
    engines: list[ManagedEngine] = []
    fleet = Fleet(engines)
    try:
        for index, fact in enumerate(facts):
            engines.append(_attached(f"engine-{index}", fact, needs, api_key, request_timeout_s))
            fleet.engines = tuple(engines)
    except BaseException:
        fleet.close()
        raise
    if on_progress is not None:
        on_progress([(engine.name, "ready") for engine in engines], 0.0)
    _log(engines, facts, has_key=api_key is not None)
    return fleet


def _attached(
    name: str, facts: ServerFacts, needs: Needs, api_key: str | None, request_timeout_s: float
) -> ManagedEngine:
    engine = AttachedEngine(facts, needs, api_key)
    client = EngineClient(
        name=name,
        url=facts.url,
        api_key=api_key or "",
        log_path=None,
        request_timeout_s=request_timeout_s,
        model=facts.request_model,
        has_plugin=facts.has_plugin,
    )
    return ManagedEngine(process=engine, client=client)


def _log(engines: Sequence[ManagedEngine], facts: Sequence[ServerFacts], *, has_key: bool) -> None:
    for engine, fact in zip(engines, facts, strict=True):
        logger.info(
            "%s is %s: %d worker(s), %s on %s", engine.name, fact.url, fact.num_workers, fact.dtype, fact.device
        )
    if not facts[0].has_plugin:
        logger.warning(
            "The engines were started without Shoal's plugin: weights go by vLLM's own update, all of them from rank "
            "0, which is slower, and nothing is proven. `shoal serve` starts engines with it."
        )
    if not has_key:
        logger.warning("The engines need no key: whoever reaches them can control them.")
