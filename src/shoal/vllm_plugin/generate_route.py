"""ASGI middleware with a route of its own, which writes completions and answers with arrays instead of JSON.

vLLM's own routes turn every token into text and JSON, in the process that also feeds the engine (docs/decisions/0011).
This one asks the same engine client for token ids and logprobs, and sends them on a few dozen at a time.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.responses import JSONResponse

from shoal import vllm_compat
from shoal.vllm_plugin.frames import Kind, message_frame, tokens_frame
from shoal.vllm_plugin.gate import App, Receive, Scope, Send
from shoal.vllm_plugin.orders import PATH, Order, OrderError, parse_order
from shoal.vllm_plugin.scheduler import PATH as SCHEDULER

logger = logging.getLogger(__name__)

_MOST_BODY_BYTES = 256 << 20
_ENDS = {"stop": Kind.STOP, "length": Kind.LENGTH, "abort": Kind.ABORT}


class GenerateRoute:
    """Answer `POST /shoal/generate`; pass everything else on.

    The body is that of `shoal.vllm_plugin.orders`, the answer that of `shoal.vllm_plugin.frames`. A body that is no
    order gets a 400. What goes wrong with a single sample is said in its last frame and leaves the others alone. A
    sample is aborted by its name, and all of them when the caller goes away.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do it, or pass the request on."""
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        state = scope["app"].state
        try:
            order = parse_order(await _body(receive))
            answer = _Answer(state, order)
        except OrderError as error:
            await JSONResponse({"error": str(error)}, status_code=400)(scope, receive, send)
            return
        await answer.give(receive, send)


async def _body(receive: Receive) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise OrderError("the caller went away")
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > _MOST_BODY_BYTES:
            raise OrderError(f"the body has more than {_MOST_BODY_BYTES} bytes")
        if not message.get("more_body", False):
            return b"".join(pieces)


class _Answer:
    """The completions of one order while they are written.

    Args:
        state: The server's.
        order: What was asked for.

    Raises:
        OrderError: vLLM would not take it.
    """

    def __init__(self, state: Any, order: Order) -> None:
        self._engine = state.engine_client
        self._order = order
        is_held = vllm_compat.scheduler_name(self._engine) == SCHEDULER
        try:
            self._adapter = vllm_compat.adapter_request(state, order.model)
            self._params = [
                vllm_compat.sampling_params(
                    sample.sampling, seed=sample.seed, flush_tokens=order.flush_tokens, is_held=is_held
                )
                for sample in order.samples
            ]
        except Exception as error:
            if not vllm_compat.is_refusal(error):
                raise
            raise OrderError(str(error)) from error
        self._bytes = bytearray()
        self._changed = asyncio.Event()
        self._num_open = len(order.samples)
        self._is_gone = False

    async def give(self, receive: Receive, send: Send) -> None:
        """Write all samples and send on what there is, until all have ended or nobody listens any more."""
        work = [asyncio.create_task(self._write(index)) for index in range(len(self._order.samples))]
        work.append(asyncio.create_task(self._watch(receive)))
        try:
            headers = [(b"content-type", b"application/octet-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while not self._is_gone:
                await self._changed.wait()
                self._changed.clear()
                # What several samples have put here since goes out together.
                data, self._bytes = bytes(self._bytes), bytearray()
                is_last = self._num_open == 0
                await send({"type": "http.response.body", "body": data, "more_body": not is_last})
                if is_last:
                    return
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        self._is_gone = True
        self._changed.set()

    async def _write(self, index: int) -> None:
        """Write one sample. Being cancelled aborts it."""
        token_ids: list[int] = []
        logprobs: list[float] = []
        kind = Kind.MORE
        message = "its engine ended it without a reason"
        try:
            async for piece in self._pieces(index):
                token_ids += piece.token_ids
                logprobs += piece.logprobs
                if piece.finish_reason is not None:
                    message = f"its engine ended it by {piece.finish_reason!r}"
                    kind = _ENDS.get(piece.finish_reason, Kind.FAILED)
                elif len(token_ids) >= self._order.flush_tokens:
                    self._put(tokens_frame(index, Kind.MORE, token_ids, logprobs))
                    token_ids, logprobs = [], []
        except Exception as error:  # whatever it is, the caller is told
            kind = Kind.REFUSED if vllm_compat.is_refusal(error) else Kind.FAILED
            message = f"{type(error).__name__}: {error}"
            if kind is Kind.FAILED:
                logger.warning("a completion failed: %s", message)
        finally:
            self._num_open -= 1
        if kind in (Kind.MORE, Kind.REFUSED, Kind.FAILED):
            if token_ids:
                self._put(tokens_frame(index, Kind.MORE, token_ids, logprobs))
            self._put(message_frame(index, Kind.REFUSED if kind is Kind.REFUSED else Kind.FAILED, message))
        else:
            self._put(tokens_frame(index, kind, token_ids, logprobs))

    def _pieces(self, index: int) -> vllm_compat.Pieces:
        sample = self._order.samples[index]
        return vllm_compat.write(
            self._engine,
            sample.prompt_token_ids,
            self._params[index],
            name=sample.name,
            adapter=self._adapter,
            cache_salt=self._order.salt,
        )

    def _put(self, frame: bytes) -> None:
        self._bytes += frame
        self._changed.set()
