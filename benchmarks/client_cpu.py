"""Processor time that completions cost the trainer's process, by either route, with no engine.

    python benchmarks/client_cpu.py

A stand-in answers `/shoal/generate` with frames of 64 tokens and `/v1/completions` with JSON as vLLM writes it; 256
completions of 512 tokens, 8 of each prompt, go through the pool. The last line is one JSON object: seconds for a
million tokens, one for each go.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import httpx
import uvicorn

from shoal.bench.throughput_settings import ThroughputSettings, draw_groups
from shoal.engines.client import EngineClient
from shoal.engines.process import choose_ports
from shoal.rollout.dispatch import DispatchSettings
from shoal.rollout.pool import EnginePool, PoolSettings
from shoal.vllm_plugin.frames import Kind, tokens_frame
from shoal.vllm_plugin.orders import PATH, parse_order

SETTINGS = ThroughputSettings(
    model_shape="qwen3-1.7b", device="cpu", num_samples=256, num_generations=8, tokens=512, prompt_tokens=64, repeats=4
)
FLUSH = 64
IDS, LOGPROB = range(1000, 1000 + SETTINGS.tokens), -1.2345678
METRICS = b'vllm:other{a="b"} 1.0\n' * 600 + b"vllm:num_requests_running 0.0\nvllm:num_requests_waiting 0.0\n"


def main() -> None:
    """Serve in a process of its own, and measure in this one."""
    (port,) = choose_ports(1, None)
    server = subprocess.Popen([sys.executable, __file__, str(port)])
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_up(url)
        print(json.dumps({name: asyncio.run(_measure(url, name == "ours")) for name in ("ours", "/v1/completions")}))
    finally:
        server.kill()
        server.wait()


async def _measure(url: str, has_plugin: bool) -> list[float]:
    client = EngineClient(
        name="e", url=url, api_key="k", log_path=None, request_timeout_s=300, has_plugin=has_plugin, flush_tokens=FLUSH
    )
    dispatch = DispatchSettings(max_in_flight=SETTINGS.num_samples, affinity_margin=2)
    pool = EnginePool([client], PoolSettings(dispatch=dispatch, stall_s=300))
    pool.publishing(0)
    pool.proven(0, ["e"])
    seconds = []
    async with pool.watching():
        for go in range(SETTINGS.repeats):
            groups = draw_groups(SETTINGS, go=go, num_engines=1)
            began = time.process_time()
            rollouts = await asyncio.gather(*(pool.generate_group(group) for group in groups))
            used = time.process_time() - began
            num_tokens = sum(len(rollout.token_ids) for group in rollouts for rollout in group)
            assert num_tokens == SETTINGS.num_samples * SETTINGS.tokens
            seconds.append(round(used / num_tokens * 1e6, 3))
    await client.aclose()
    return seconds


async def _app(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while (message := await receive()).get("more_body"):
        body += message["body"]
    body += message.get("body", b"")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == PATH:
        samples = range(len(parse_order(body).samples))
        for start in range(0, SETTINGS.tokens, FLUSH):
            await asyncio.sleep(0.05)
            kind = Kind.MORE if start + FLUSH < SETTINGS.tokens else Kind.LENGTH
            ids = IDS[start : start + FLUSH]
            data = b"".join(tokens_frame(sample, kind, ids, [LOGPROB] * FLUSH) for sample in samples)
            await send({"type": "http.response.body", "body": data, "more_body": True})
    else:
        data = METRICS if scope["path"] == "/metrics" else _completion()
        await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _completion() -> bytes:
    num = SETTINGS.tokens
    logprobs = {
        "text_offset": list(range(num)),
        "token_logprobs": [LOGPROB] * num,
        "tokens": ["word"] * num,
        "top_logprobs": [{"word": LOGPROB}] * num,
    }
    choice = {"text": "word" * num, "logprobs": logprobs, "finish_reason": "length", "token_ids": list(IDS)}
    return json.dumps({"choices": [choice]}).encode()


def _wait_until_up(url: str) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            httpx.get(url + "/metrics", trust_env=False)
            return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise TimeoutError("the stand-in did not start within 300 s")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        uvicorn.run(_app, port=int(sys.argv[1]), log_level="error", lifespan="off")
    else:
        main()
