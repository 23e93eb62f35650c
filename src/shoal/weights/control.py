"""Drive one engine's control routes during a publish. Trainer rank 0 does."""

from __future__ import annotations

from concurrent.futures import Executor
from contextlib import suppress
from typing import Any, Protocol

from shoal.errors import EngineRequestError, WeightSyncError

_RECEIVE_PATH = "/shoal/receive"  # shoal.vllm_plugin.publish_route
_QUICK_S = 5.0


class ControlClient(Protocol):
    """What is needed of an engine's client."""

    weight_version: int
    cache_salt: str

    @property
    def name(self) -> str:
        """Short name."""
        ...

    def post(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        """Call a control route."""
        ...

    def has_died(self) -> bool:
        """Whether the engine is known to be gone."""
        ...


class EngineControl:
    """The control routes of one engine.

    Args:
        client: The engine's.
        threads: For calls whose answer nobody waits for.
        timeout_s: For each call.
    """

    def __init__(self, client: ControlClient, threads: Executor, timeout_s: float) -> None:
        self.client = client
        self._threads = threads
        self._timeout_s = timeout_s

    def call(self, method: str, **arguments: Any) -> list[Any]:
        """Have every worker of the engine do something (`shoal.vllm_plugin.worker`); return their answers.

        Raises:
            WeightSyncError: Some could not; the message names them all, since one that fails takes others with it.
        """
        return self._values(self._post("/collective_rpc", {"method": method, "kwargs": arguments}), method)

    def receive(self, *, pauses: bool, patience_s: float, **arguments: Any) -> tuple[list[Any], float]:
        """Have every worker receive weights (`shoal_receive`), once the engine has stopped before its next step.

        What it was writing keeps its place and its KV cache.

        Args:
            pauses: Whether it has to be paused.
            patience_s: How long to wait for both.
            arguments: Of `shoal_receive`.

        Returns:
            The workers' answers, and how long pausing took, in seconds.

        Raises:
            WeightSyncError: See `call`.
        """
        answer = self._post(_RECEIVE_PATH, {"pauses": pauses, "kwargs": arguments}, patience_s)
        values = self._values(answer, "shoal_receive")
        try:
            return values, float(answer["pause_s"])
        except (KeyError, TypeError, ValueError) as error:
            raise WeightSyncError(f"{self.client.name} does not say how long pausing took: {error!r}") from error

    def resume(self) -> None:
        """Let the engine go on.

        Raises:
            WeightSyncError: It could not.
        """
        self._post("/resume")

    def resume_if_possible(self) -> None:
        """Let an engine go on that may not answer; nobody waits for it."""

        def attempt() -> None:
            # It is known to have failed, and its own error has been reported.
            with suppress(EngineRequestError):
                self.client.post("/resume", None, _QUICK_S)

        with suppress(RuntimeError):  # the threads are given back: nobody publishes any more
            self._threads.submit(attempt)

    def _values(self, answer: Any, method: str) -> list[Any]:
        try:
            results = list(answer["results"])
            failed = [
                f"{self.client.name} worker {worker} failed at {method}: {result['error']}"
                for worker, result in enumerate(results)
                if "error" in result
            ]
            values = [] if failed else [result["value"] for result in results]
        except (KeyError, TypeError) as error:
            raise WeightSyncError(f"{self.client.name} answered {method} with something else: {error!r}") from error
        if failed:
            raise WeightSyncError("; ".join(failed))
        return values

    def _post(self, path: str, body: dict[str, Any] | None = None, patience_s: float | None = None) -> Any:
        try:
            return self.client.post(path, body, patience_s or self._timeout_s)
        except EngineRequestError as error:
            raise WeightSyncError(f"publishing weights to {self.client.name} failed at {path}: {error}") from error
