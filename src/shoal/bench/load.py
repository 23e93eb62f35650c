"""Long completions that are under way on the engines while weights are published."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType

from shoal.bench.children import StageError
from shoal.engines.client import EngineClient
from shoal.errors import EngineRequestError
from shoal.rollout.loop_thread import LoopThread
from shoal.types import RolloutRequest, SamplingSettings

_PROMPT_TOKENS = 16
_POLL_S = 0.02
_QUICK_S = 10.0
_AFTER_FAILURE_S = 0.1


class RunningLoad:
    """Keeps completions under way, each followed by the next; use as a context manager.

    Args:
        clients: Of the engines; the requests are spread evenly. Their asynchronous half is used up by this.
        num_requests: Under way at any time, over all engines.
        max_tokens: Longest prompt with completion.
        vocabulary: Prompts are made of its tokens.
    """

    def __init__(self, clients: Sequence[EngineClient], num_requests: int, *, max_tokens: int, vocabulary: int) -> None:
        self._clients = tuple(clients)
        self._num_requests = num_requests
        self._vocabulary = vocabulary
        self._sampling = SamplingSettings(temperature=1.0, max_tokens=max_tokens - _PROMPT_TOKENS, stop_token_ids=())
        self._loop = LoopThread("running completions")
        self._tasks: list[asyncio.Task[None]] = []
        self.last_failure = ""

    def __enter__(self) -> RunningLoad:
        self._loop.run(self._begin(), timeout_s=_QUICK_S, what="the first requests")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run(self._end(), timeout_s=_QUICK_S, what="the completions to be given up")
        self._loop.close()

    def wait_until_running(self, timeout_s: float) -> int:
        """Wait until the engines say that they write this many completions; return how many they write.

        Raises:
            StageError: They do not.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            running = sum(client.num_running(_QUICK_S) for client in self._clients)
            if running >= self._num_requests:
                return running
            if time.monotonic() > deadline:
                said = f"; the last failure: {self.last_failure}" if self.last_failure else ""
                raise StageError(
                    f"after {timeout_s:g} s the engines write {running} completions, not {self._num_requests}{said}. "
                    "Lower --running-requests."
                )
            time.sleep(_POLL_S)

    async def _begin(self) -> None:
        self._tasks = [asyncio.create_task(self._write(index)) for index in range(self._num_requests)]

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self._clients:
            await client.aclose()

    async def _write(self, index: int) -> None:
        """Ask for one completion after another."""
        client = self._clients[index % len(self._clients)]
        seed = index
        while True:
            try:
                await client.generate(self._request(seed))
            except EngineRequestError as error:
                self.last_failure = str(error)
                await asyncio.sleep(_AFTER_FAILURE_S)
            seed += self._num_requests

    def _request(self, seed: int) -> RolloutRequest:
        tokens = tuple(3 + (31 * seed + 7 * place) % (self._vocabulary - 3) for place in range(_PROMPT_TOKENS))
        return RolloutRequest(prompt_token_ids=tokens, seed=seed, sampling=self._sampling)
