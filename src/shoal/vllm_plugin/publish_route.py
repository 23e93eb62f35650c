"""ASGI middleware with a route of its own, which pauses an engine and then has its workers receive weights.

vLLM has routes for both. One after the other they wait several times for the server's event loop, which is busy while
the engine writes, and its `/pause` sleeps for 20 ms once the pause is in force (`AsyncLLM.pause_generation`, 0.26 to
0.33).
"""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import JSONResponse

from shoal import vllm_compat
from shoal.vllm_plugin.gate import App, Receive, Scope, Send

PATH = "/shoal/receive"


class PublishRoute:
    """Answer `POST /shoal/receive`; pass everything else on.

    The request's body is `{"pauses": bool, "kwargs": {...}}`, with the arguments of `ShoalWorker.shoal_receive`. The
    answer is `{"results": [...], "pause_s": float}`: what each worker answered, and how long pausing took.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do it, or pass the request on."""
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        engine = scope["app"].state.engine_client
        info = await Request(scope, receive).json()
        began = time.perf_counter()
        if info["pauses"]:
            await vllm_compat.pause(engine)
        pause_s = time.perf_counter() - began
        results = await engine.collective_rpc("shoal_receive", kwargs=info["kwargs"])
        await JSONResponse({"results": results, "pause_s": pause_s})(scope, receive, send)
