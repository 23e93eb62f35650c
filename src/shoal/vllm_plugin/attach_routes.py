"""ASGI middleware with two routes for trainers that attach to an engine which others started.

`GET /shoal/about` says what the engine is. `POST /shoal/hold` belongs to one trainer at a time: its answer goes on for
as long as the trainer lives, and when it is gone, however that came about, the engine is let go on. A trainer that dies
in the middle of a publish would else leave an engine behind that is paused for ever.
"""

from __future__ import annotations

import asyncio
import json
import logging

from starlette.requests import Request
from starlette.responses import JSONResponse

from shoal import vllm_compat
from shoal.vllm_plugin.gate import App, Receive, Scope, Send
from shoal.wire.agreement import own_version

logger = logging.getLogger("vllm.shoal")  # a vLLM server shows what its own loggers say, and of others only warnings

ABOUT_PATH = "/shoal/about"
HOLD_PATH = "/shoal/hold"

_BEAT_S = 5.0
_MOST_OF_A_NAME = 200


class AttachRoutes:
    """Answer the two routes; pass everything else on.

    The hold's body is `{"trainer": "..."}`, a name for messages. It answers 409 with the same while another trainer
    holds the engine; else 200, and one line now and then.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._holder: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do it, or pass the request on."""
        asked = (scope["method"], scope["path"]) if scope["type"] == "http" else None
        if asked == ("GET", ABOUT_PATH):
            about = {"shoal": own_version()} | vllm_compat.describe(scope["app"].state.engine_client)
            # A model's configuration may hold values that JSON does not know, such as types.
            await JSONResponse(json.loads(json.dumps(about, default=str)))(scope, receive, send)
        elif asked == ("POST", HOLD_PATH):
            await self._hold(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _hold(self, scope: Scope, receive: Receive, send: Send) -> None:
        trainer = str((await Request(scope, receive).json())["trainer"])[:_MOST_OF_A_NAME]
        if self._holder is not None:
            await JSONResponse({"trainer": self._holder}, status_code=409)(scope, receive, send)
            return
        self._holder = trainer
        logger.info("%s has attached to this engine", trainer)
        try:
            await _until_gone(receive, send)
        finally:
            self._holder = None
            logger.info("%s is gone, this engine goes on", trainer)
            await vllm_compat.resume(scope["app"].state.engine_client)


async def _until_gone(receive: Receive, send: Send) -> None:
    """Answer for as long as the other side listens. The beats find out that its host is gone without a word."""
    headers = [(b"content-type", b"application/jsonl")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    gone = asyncio.ensure_future(receive())
    try:
        while not gone.done():
            await send({"type": "http.response.body", "body": b"{}\n", "more_body": True})
            await asyncio.wait({gone}, timeout=_BEAT_S)
    finally:
        gone.cancel()
