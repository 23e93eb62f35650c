"""An engine without vLLM: its control routes answer in this process, and its workers receive weights for real."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from shoal.errors import EngineRequestError
from shoal.types import UNPROVEN
from shoal.vllm_plugin.worker import ShoalWorker


class LoopbackWorker(ShoalWorker):
    """What Shoal's worker extension needs of a vLLM worker.

    Args:
        model: With vLLM's `load_weights`.
        rank: Of this worker within its engine.
    """

    def __init__(self, model: nn.Module, rank: int) -> None:
        self.model = model
        self.model_runner = SimpleNamespace(get_model=lambda: model)
        self.device = torch.device("cpu")
        self.rank = rank
        self.parallel_config = SimpleNamespace(data_parallel_index=0, world_size=1)
        self.vllm_config = None


class LoopbackEngine:
    """A `ControlClient` of an engine whose workers are threads.

    Args:
        name: Of the engine.
        models: One for each worker.

    Attributes:
        called: What was called: routes, and methods of workers.
        fails_at: What answers with an error.
        stalls_at: What does not answer, until `released`.
    """

    def __init__(self, name: str, models: Sequence[nn.Module]) -> None:
        self._name = name
        self.workers = [LoopbackWorker(model, rank) for rank, model in enumerate(models)]
        self.weight_version = UNPROVEN
        self.cache_salt = ""
        self.is_paused = False
        self.called: list[str] = []
        self.fails_at: set[str] = set()
        self.stalls_at: set[str] = set()
        self.is_dead = False
        self.released = threading.Event()

    @property
    def name(self) -> str:
        """Short name."""
        return self._name

    def post(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        """Pause and receive, resume, or call a method of every worker."""
        if path != "/collective_rpc":
            self._note(path, timeout_s)
        if body is None:
            assert path == "/resume"
            self.is_paused = False
            return {}
        method = body.get("method", "shoal_receive")
        self.is_paused |= body.get("pauses", False)
        self._note(method, timeout_s)
        results = self._on_workers(method, json.dumps(body["kwargs"]))
        return json.loads(json.dumps({"results": results, "pause_s": 0.0}))

    def has_died(self) -> bool:
        """Whether it was told to have."""
        return self.is_dead

    def leave(self) -> None:
        """Answer whoever waits, and have the workers leave their trainer, if they have one."""
        self.released.set()
        for worker in self.workers:
            worker._shoal_leave()

    def _note(self, what: str, timeout_s: float) -> None:
        self.called.append(what)
        if what in self.stalls_at:
            self.released.wait(timeout_s)
            raise EngineRequestError(f"{self._name} did not answer {what} within {timeout_s:g} s")
        if what in self.fails_at:
            raise EngineRequestError(f"{self._name} answered {what} with status 500: told to fail")

    def _on_workers(self, method: str, arguments: str) -> list[Any]:
        with ThreadPoolExecutor(len(self.workers), thread_name_prefix=self._name) as threads:
            return list(threads.map(lambda worker: getattr(worker, method)(**json.loads(arguments)), self.workers))
