"""An engine that writes made-up tokens, as slowly and as unreliably as a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from shoal.errors import EngineFaultError
from shoal.types import EngineReport, Rollout, RolloutRequest


class FakeEngine:
    """A `RolloutEngine` whose completions follow from the request's seed alone.

    Args:
        name: Of the engine.
        delay_s: Seconds that a request takes, from its seed.
        fails: Whether a request fails, from its seed.
    """

    def __init__(
        self,
        name: str,
        *,
        delay_s: Callable[[int], float] = lambda seed: 0.0,
        fails: Callable[[int], bool] = lambda seed: False,
    ) -> None:
        self._name = name
        self._delay_s = delay_s
        self._fails = fails
        self.requests: list[RolloutRequest] = []
        self._cuts: dict[str, asyncio.Event] = {}
        self.running = 0
        self.most_running = 0
        self.num_tokens = 0
        self.weight_version = 0

    @property
    def name(self) -> str:
        """Short name."""
        return self._name

    def written(self, name: str) -> Rollout | None:
        """Nothing: it answers when it has ended."""
        return None

    async def cut(self, name: str) -> None:
        """Have a request return the first half of what it would have."""
        if name in self._cuts:
            self._cuts[name].set()

    async def report(self) -> EngineReport:
        """Say what it is doing; its counter of tokens moves with every completion."""
        return EngineReport(running=self.running, waiting=0, num_tokens=self.num_tokens)

    async def generate(self, request: RolloutRequest) -> Rollout:
        """Write one completion of 1 to `max_tokens` tokens."""
        self.requests.append(request)
        cut = self._cuts[request.name] = asyncio.Event()
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(cut.wait(), self._delay_s(request.seed))
            if self._fails(request.seed):
                raise EngineFaultError(f"{self._name} was told to fail")
        finally:
            self.running -= 1
            self._cuts.pop(request.name, None)
        self.num_tokens += 1
        random = np.random.default_rng(request.seed)
        length = int(random.integers(1, request.sampling.max_tokens + 1))
        end = length // 2 if cut.is_set() else length
        return Rollout(
            token_ids=random.integers(3, 100, size=length).astype(np.int32)[:end],
            rollout_logprobs=-random.random(length).astype(np.float32)[:end],
            finish_reason="cut" if cut.is_set() else "stop" if length < request.sampling.max_tokens else "length",
            weight_version=self.weight_version,
            engine=self._name,
        )
