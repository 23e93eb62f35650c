"""Bring lost engines back beside everything else: on a thread for each, with more patience at each attempt."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shoal.engines.client import EngineClient
from shoal.engines.guard import GRACE_S

logger = logging.getLogger(__name__)

_CLOSE_S = GRACE_S + 25.0  # a thread that waits for what is left of an engine waits no longer


class Started(Protocol):
    """An engine whose server is up again."""

    @property
    def name(self) -> str:
        """Of the engine."""
        ...

    @property
    def client(self) -> EngineClient:
        """Talks to its new server."""
        ...


class Restartable(Protocol):
    """What can start engines anew: a `Fleet`."""

    def restart(self, name: str, *, timeout_s: float, stop: threading.Event) -> Started:
        """Start an engine anew and wait until its server answers; see `Fleet.restart`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartSettings:
    """How lost engines are brought back.

    Attributes:
        max_in_a_row: Attempts before an engine is given up; 0 for none.
        timeout_s: For the start of one.
        first_wait_s: Before the first attempt; twice as long before each that follows.
        longest_wait_s: Before any attempt.
        settled_s: An engine that has served for so long is forgiven its former attempts.
    """

    max_in_a_row: int
    timeout_s: float
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    settled_s: float = 600.0


class Restarts:
    """Starts engines anew. All methods may be called from any thread.

    Args:
        fleet: Starts one.
        settings: How often, and how patiently.
        on_given_up: Told the name of an engine that does not come back, and why; on a thread of its own.
    """

    def __init__(
        self, fleet: Restartable, settings: RestartSettings, *, on_given_up: Callable[[str, str], None]
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._on_given_up = on_given_up
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._ready: list[Started] = []
        self._num_in_a_row: dict[str, int] = {}
        self._served_since: dict[str, float] = {}
        self.num_restarted = 0
        """How often an engine has come up again."""

    def begin(self, name: str, reason: str) -> bool:
        """Begin to bring an engine back; return False if it has used up its attempts."""
        with self._lock:
            since = self._served_since.pop(name, None)
            if since is not None and time.monotonic() - since >= self._settings.settled_s:
                self._num_in_a_row.pop(name, None)
            if self._closing.is_set() or self._num_in_a_row.get(name, 0) >= self._settings.max_in_a_row:
                return False
            thread = threading.Thread(target=self._bring_back, args=(name, reason), daemon=True, name=f"restart {name}")
            self._threads = [*(other for other in self._threads if other.is_alive()), thread]
            thread.start()
            return True

    def take_ready(self) -> list[Started]:
        """Return the engines that have come up since the last call; they hold no weights yet."""
        with self._lock:
            ready, self._ready = self._ready, []
            return ready

    def serves(self, name: str) -> None:
        """Take note that an engine that was brought back holds the current weights and serves."""
        with self._lock:
            self._served_since[name] = time.monotonic()

    def close(self) -> None:
        """Give up what is under way, and wait until no engine is being started any more."""
        with self._lock:
            self._closing.set()
        for thread in self._threads:
            thread.join(_CLOSE_S)

    def _bring_back(self, name: str, reason: str) -> None:
        settings = self._settings
        while (number := self._next_attempt(name)) is not None:
            if self._closing.wait(min(settings.first_wait_s * 2 ** (number - 1), settings.longest_wait_s)):
                return
            began = time.monotonic()
            try:
                engine = self._fleet.restart(name, timeout_s=settings.timeout_s, stop=self._closing)
            except Exception as error:  # whatever it is: nobody else would learn that the engine does not come
                if self._closing.is_set():
                    return
                reason = str(error)
                logger.warning("%s: attempt %d of %d to restart failed: %s", name, number, settings.max_in_a_row, error)
                continue
            logger.warning("%s is restarted after %.0f s and is given the weights next", name, time.monotonic() - began)
            with self._lock:
                self.num_restarted += 1
                self._ready.append(engine)
            return
        self._on_given_up(name, f"{settings.max_in_a_row} attempts to restart it failed; the last one: {reason}")

    def _next_attempt(self, name: str) -> int | None:
        """Return the number of the next attempt in a row; None if there are no more."""
        with self._lock:
            number = self._num_in_a_row.get(name, 0) + 1
            if number > self._settings.max_in_a_row:
                return None
            self._num_in_a_row[name] = number
            return number
