"""The client's half of `POST /shoal/generate`: completions of an engine with our plugin, straight into arrays.

What is asked for in the same turn of the event loop goes to the engine in one request, such as all samples of a prompt,
and their frames come back in one stream. A request costs as much as hundreds of tokens, so it is paid once for all.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np

from shoal.engines.answers import checked_rollout, read_error
from shoal.errors import EngineFaultError, EngineRequestError
from shoal.types import Rollout, RolloutRequest
from shoal.vllm_plugin.frames import Frame, FrameError, FrameReader, Kind
from shoal.vllm_plugin.orders import PATH, order_body

logger = logging.getLogger(__name__)

_MOST_AT_ONCE = 64
_ABORT_TIMEOUT_S = 10.0
_ENDS = {Kind.STOP: "stop", Kind.LENGTH: "length", Kind.ABORT: "abort"}


@dataclass(slots=True, eq=False)
class _Sample:
    """One completion under way."""

    request: RolloutRequest
    version: int
    whole: asyncio.Future[Rollout]
    frames: list[Frame] = field(default_factory=list)
    stream: asyncio.Task[None] | None = None
    was_cut: bool = False


class LeanRoute:
    """Asks one engine for completions. It belongs to one event loop.

    Args:
        http: With the engine's address and key.
        engine: Its name, for messages.
        model: What completions are asked of.
        timeout_s: Longest that one completion may take.
        flush_tokens: Tokens that the engine sends on together; 0 for whole completions only.
        see_log: Where to look, for messages.
    """

    def __init__(
        self, http: httpx.AsyncClient, *, engine: str, model: str, timeout_s: float, flush_tokens: int, see_log: str
    ) -> None:
        self._http = http
        self._engine = engine
        self._model = model
        self._timeout_s = timeout_s
        self._flush_tokens = flush_tokens
        self._see_log = see_log
        self._prefix = secrets.token_hex(4)  # another trainer's requests may be on the same engine
        self._num_unnamed = 0
        self._samples: dict[str, _Sample] = {}
        self._waiting: dict[str, list[_Sample]] = {}  # by the salt that they are asked for with
        self._tasks: set[asyncio.Task[None]] = set()

    async def write(self, request: RolloutRequest, *, version: int, salt: str) -> Rollout:
        """Have one completion written.

        Args:
            request: Without a name, it is given one.
            version: Of the weights that the engine holds.
            salt: For its prefix cache.

        Raises:
            EngineRequestError: The engine refused the request, or its weights do not compute.
            EngineFaultError: The engine failed, took too long, or answered with something malformed. It carries what
                had been received.
        """
        if not request.name:
            self._num_unnamed += 1
            request = replace(request, name=f"{self._prefix}-unnamed-{self._num_unnamed}")
        loop = asyncio.get_running_loop()
        sample = _Sample(request, version, loop.create_future())
        self._samples[request.name] = sample
        if not self._waiting:
            loop.call_soon(self._send)
        self._waiting.setdefault(salt, []).append(sample)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await sample.whole
        except TimeoutError as error:
            what = f"{self._engine} did not answer {PATH} within {self._timeout_s:g} s{self._see_log}"
            raise EngineFaultError(what, partial=self._partial(sample)) from error
        finally:
            del self._samples[request.name]
            self._leave(sample)

    async def cut(self, name: str) -> None:
        """Have the completion of this name end, and return what it has so far.

        Raises:
            EngineRequestError: The engine did not take it.
        """
        if (sample := self._samples.get(name)) is not None:
            sample.was_cut = True
            await self._abort([name])

    def written(self, name: str) -> Rollout | None:
        """Return what has been received so far of the completion of this name."""
        sample = self._samples.get(name)
        return None if sample is None else self._partial(sample)

    async def aclose(self) -> None:
        """End what is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- the stream ----

    def _send(self) -> None:
        """Ask for all that waits."""
        waiting, self._waiting = self._waiting, {}
        for salt, samples in waiting.items():
            samples = [sample for sample in samples if not sample.whole.done()]
            for start in range(0, len(samples), _MOST_AT_ONCE):
                batch = samples[start : start + _MOST_AT_ONCE]
                task = self._start(self._stream(batch, salt))
                for sample in batch:
                    sample.stream = task

    async def _stream(self, samples: Sequence[_Sample], salt: str) -> None:
        """Ask for some samples and take up what comes; all of them have ended afterwards."""
        requests = [sample.request for sample in samples]
        body = order_body(requests, model=self._model, salt=salt, flush_tokens=self._flush_tokens)
        reader = FrameReader([request.sampling.max_tokens for request in requests])
        failure = "its answer ended before the completions did"
        try:
            async with self._http.stream("POST", PATH, content=body) as response:
                if response.status_code != httpx.codes.OK:
                    self._refuse(samples, response.status_code, await read_error(response))
                    return
                async for data in response.aiter_raw():
                    for frame in reader.feed(data):
                        self._take(samples[frame.sample], frame)
        except FrameError as error:
            failure = f"it sent something malformed: {error}"
        except httpx.HTTPError as error:
            failure = f"{type(error).__name__} {error}"
        finally:
            for sample in samples:
                self._fail(sample, failure)

    def _take(self, sample: _Sample, frame: Frame) -> None:
        if sample.whole.done():
            return
        if frame.kind is Kind.REFUSED:
            sample.whole.set_exception(EngineRequestError(f"{self._engine} refused a completion: {frame.message}"))
        elif frame.kind is Kind.FAILED:
            self._fail(sample, frame.message)
        else:
            sample.frames.append(frame)
            if frame.kind is not Kind.MORE:
                self._finish(sample, _ENDS[frame.kind])

    def _finish(self, sample: _Sample, finish_reason: str) -> None:
        try:
            sample.whole.set_result(self._rollout(sample, finish_reason))
        except EngineRequestError as error:
            sample.whole.set_exception(error)

    def _fail(self, sample: _Sample, why: str) -> None:
        if not sample.whole.done():
            what = f"{self._engine} did not finish a completion of {PATH}: {why}{self._see_log}"
            sample.whole.set_exception(EngineFaultError(what, partial=self._partial(sample)))

    def _refuse(self, samples: Sequence[_Sample], status: int, said: str) -> None:
        # What is wrong with the request (4xx) is wrong everywhere.
        kind = EngineRequestError if 400 <= status < 500 else EngineFaultError
        for sample in samples:
            if not sample.whole.done():
                text = f"{self._engine} answered {PATH} with status {status}: {said[:500]}{self._see_log}"
                sample.whole.set_exception(kind(text))

    def _partial(self, sample: _Sample) -> Rollout | None:
        """Return what was received, as a completion that was cut; None if it is nothing, or nothing to go on with."""
        if not any(len(frame.token_ids) for frame in sample.frames):
            return None
        try:
            return self._rollout(sample, "cut")
        except EngineRequestError:
            return None

    def _rollout(self, sample: _Sample, finish_reason: str) -> Rollout:
        return checked_rollout(
            self._engine,
            np.concatenate([frame.token_ids for frame in sample.frames]),
            np.concatenate([frame.logprobs for frame in sample.frames]),
            finish_reason,
            version=sample.version,
            was_cut=sample.was_cut,
        )

    # ---- giving up ----

    def _leave(self, sample: _Sample) -> None:
        """Free the engine's slot if nobody waits for the sample any more."""
        if not sample.whole.cancel() and not sample.whole.cancelled():
            sample.whole.exception()  # nobody may have waited for it
            return
        if sample.stream is None or sample.stream.done():
            return
        if any(other.stream is sample.stream for other in self._samples.values()):
            self._start(self._abort_quietly(sample.request.name))
        else:
            sample.stream.cancel()  # hanging up ends all that the engine writes for it

    async def _abort(self, names: Sequence[str]) -> None:
        """Have completions end.

        Raises:
            EngineRequestError: The engine did not take it.
        """
        try:
            response = await self._http.post(
                "/abort_requests", json={"request_ids": list(names)}, timeout=_ABORT_TIMEOUT_S
            )
        except httpx.HTTPError as error:
            what = f"{self._engine} did not answer /abort_requests: {type(error).__name__} {error}{self._see_log}"
            raise EngineFaultError(what) from error
        if response.status_code != httpx.codes.OK:
            kind = EngineRequestError if 400 <= response.status_code < 500 else EngineFaultError
            raise kind(f"{self._engine} answered /abort_requests with status {response.status_code}{self._see_log}")

    async def _abort_quietly(self, name: str) -> None:
        try:
            await self._abort([name])
        except EngineRequestError as error:
            logger.info("a completion that nobody waits for is written on: %s", error)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
