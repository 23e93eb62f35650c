"""Drive one engine's control routes during a publish, and around its sleep. Trainer rank 0 does."""

from __future__ import annotations

import time
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any, Literal, Protocol, TypeVar

from shoal.errors import EngineRequestError, WeightSyncError

_RECEIVE_PATH = "/shoal/receive"  # shoal.vllm_plugin.publish_route
_QUICK_S = 5.0
_LOOK_S = 1.0
"""How often to look whether an engine that is waited for has died."""

_T = TypeVar("_T")

SleepLevel = Literal[1, 2]
"""vLLM's: 1 keeps the weights in host memory, 2 drops them. Both drop the KV cache, and the prefix cache with it."""


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
        sleeps: Whether it sleeps between publishes.
    """

    def __init__(self, client: ControlClient, threads: Executor, timeout_s: float, *, sleeps: bool = False) -> None:
        self.client = client
        self.sleeps = sleeps
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
        """Let the engine go on; one that sleeps takes the memory of its KV cache again before.

        Raises:
            WeightSyncError: It could not.
        """
        self._wake("kv_cache")
        self._post("/resume")

    def sleep(self, level: SleepLevel) -> None:
        """Have the engine give its memory back, which ends what it is writing and empties its prefix cache.

        Raises:
            WeightSyncError: It could not.
        """
        self._post(f"/sleep?level={level}", doing="putting to sleep")

    def wake_weights(self) -> float:
        """Have an engine that sleeps take the memory of its weights again, at the addresses where it was.

        What is there is not defined after level 2. Returns how long it took, in seconds.

        Raises:
            WeightSyncError: It could not.
        """
        began = time.monotonic()
        self._wake("weights")
        return time.monotonic() - began

    def resume_if_possible(self) -> None:
        """Let an engine go on that may not answer; nobody waits for it."""

        def attempt() -> None:
            # It is known to have failed, and its own error has been reported.
            with suppress(EngineRequestError):
                self.client.post("/resume", None, _QUICK_S)

        with suppress(RuntimeError):  # the threads are given back: nobody publishes any more
            self._threads.submit(attempt)

    def _wake(self, tag: str) -> None:
        """Wake a part of an engine that may be asleep. vLLM leaves one that is awake as it is."""
        if not self.sleeps:
            return
        try:
            self._post(f"/wake_up?tags={tag}")
        except WeightSyncError as error:
            raise WeightSyncError(
                f"{error}. If its GPU has no memory left for it, lower vllm_gpu_memory_utilization, or set "
                "offload_optimizer_during_rollout=True."
            ) from error

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

    def _post(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        patience_s: float | None = None,
        *,
        doing: str = "publishing weights to",
    ) -> Any:
        try:
            return self.client.post(path, body, patience_s or self._timeout_s)
        except EngineRequestError as error:
            raise WeightSyncError(f"{doing} {self.client.name} failed at {path}: {error}") from error


def answer_of(future: Future[_T], client: ControlClient, patience_s: float) -> _T:
    """Wait for an engine's answer, as long as there is an engine.

    vLLM's server does not end a request that a dead engine was to answer.

    Raises:
        TimeoutError: It did not come within `patience_s`.
        WeightSyncError: The engine has died.
    """
    deadline = time.monotonic() + max(0.0, patience_s)
    while True:
        try:
            return future.result(max(0.0, min(_LOOK_S, deadline - time.monotonic())))
        except TimeoutError:
            if client.has_died():
                raise WeightSyncError(f"{client.name} has died in the middle of a publish, see its log") from None
            if time.monotonic() >= deadline:
                raise
