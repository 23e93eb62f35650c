"""Compare ways to have one engine write completions: tokens/s, and processor time of front end and client.

    python benchmarks/front_ends.py --device cpu --model-shape tiny --samples 64 --tokens 128
    python benchmarks/front_ends.py --device cuda --model-shape qwen3-1.7b --samples 256 --tokens 512

Rows: `vllm.LLM.generate` in a process of its own; `/v1/completions` with one request for each completion and with one
for each prompt (`n`); Shoal's route, sending whole completions or every so many tokens; and two of these with two API
servers. The last line is one JSON object. Weights are random; all rows write the same numbers of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx

from shoal.bench.engine_cpu import engine_cpu
from shoal.bench.in_process import measure_in_process
from shoal.bench.model import write_engine_folder
from shoal.bench.settings import engine_specs
from shoal.bench.throughput import Figures, Go, Writer, new_client
from shoal.bench.throughput_settings import ThroughputSettings, check_throughput, draw_groups
from shoal.engines.client import EngineClient
from shoal.engines.command import SERVED_MODEL_NAME
from shoal.engines.fleet import Fleet, ManagedEngine
from shoal.observe.summary import versions
from shoal.placement.devices import discover_devices

TIMEOUT_S = 900.0


def main() -> None:
    """Measure every way in turn and print the table and the JSON."""
    settings, output = _arguments()
    devices = tuple(discover_devices()) if settings.device == "cuda" else ()
    check_throughput(settings, len(devices))
    rows: dict[str, list[Go]] = {}
    with tempfile.TemporaryDirectory(prefix="shoal-front-ends-") as name:
        folder = Path(name)
        write_engine_folder(settings.engines(1), folder / "model", has_end=False)
        seconds = measure_in_process(settings, folder, devices, TIMEOUT_S)
        print(
            f"vllm.LLM.generate: {settings.num_samples * settings.tokens / sorted(seconds)[len(seconds) // 2]:,.0f} /s"
        )
        for servers in (1, 2):
            (spec,) = engine_specs(settings.engines(1), folder, devices)
            if servers > 1:
                spec = replace(spec, extra_arguments={**spec.extra_arguments, "api-server-count": servers})
            with Fleet.start([spec], log_dir=folder / f"logs-{servers}", timeout_s=TIMEOUT_S,
                             request_timeout_s=TIMEOUT_S) as fleet:  # fmt: skip
                _measure(fleet, settings, servers, rows)
    figures = {title: asdict(Figures.of(goes)) for title, goes in rows.items()}
    data = {
        "benchmark": "front_ends",
        "in_process_s": seconds,
        "figures": figures,
        "settings": asdict(settings),
        "versions": versions(),
        "goes": {title: [asdict(go) for go in goes] for title, goes in rows.items()},
    }
    if output is not None:
        output.write_text(json.dumps(data, indent=2) + "\n")
    print(json.dumps(data))


def _measure(fleet: Fleet, settings: ThroughputSettings, servers: int, rows: dict[str, list[Go]]) -> None:
    """Measure the ways of one engine. Each begins where the one before has ended in the list of prompts."""
    (engine,) = fleet.engines
    first = 0

    def run(title: str, write: Callable[[int], list[Go]]) -> None:
        nonlocal first
        goes = rows[title if servers == 1 else f"{title}, {servers} API servers"] = write(first)
        first += settings.repeats + 1
        figures = Figures.of(goes)
        print(f"{title} ({servers} API servers): {figures.tokens_per_s:,.0f} /s, client {figures.client_cpu_s:.2f}, "
              f"front end {figures.frontend_cpu_s:.1f}, core {figures.core_cpu_s:.1f} s/M", flush=True)  # fmt: skip

    def pooled(client: EngineClient) -> Callable[[int], list[Go]]:
        return Writer([engine], [client], settings).write

    run("/v1/completions", pooled(new_client(engine, fleet.api_key, has_plugin=False)))
    if servers == 1:
        run(f"/v1/completions, n={settings.num_generations}", _ByPrompt(engine, fleet.api_key, settings).write)
        for flush_tokens in (0, 256, 16):
            client = new_client(engine, fleet.api_key, has_plugin=True, flush_tokens=flush_tokens)
            run(f"ours, every {flush_tokens or 'all'} tokens", pooled(client))
    run("ours", pooled(engine.client))


class _ByPrompt:
    """Asks `/v1/completions` for all completions of a prompt at once."""

    def __init__(self, engine: ManagedEngine, api_key: str, settings: ThroughputSettings) -> None:
        self._engine = engine
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._settings = settings

    def write(self, first_go: int) -> list[Go]:
        return asyncio.run(self._write(first_go))[1:]

    async def _write(self, first_go: int) -> list[Go]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
        async with httpx.AsyncClient(
            base_url=self._engine.client.url, headers=self._headers, timeout=TIMEOUT_S, limits=limits, trust_env=False
        ) as http:
            return [await self._go(http, first_go + number) for number in range(self._settings.repeats + 1)]

    async def _go(self, http: httpx.AsyncClient, number: int) -> Go:
        groups = draw_groups(self._settings, go=number, num_engines=1)
        before = engine_cpu(self._engine.process.pid)
        own, began = time.process_time(), time.perf_counter()
        answers = await asyncio.gather(*(self._ask(http, group) for group in groups))
        seconds, own = time.perf_counter() - began, time.process_time() - own
        num_tokens = sum(len(choice["token_ids"]) for answer in answers for choice in answer["choices"])
        assert num_tokens == self._settings.num_samples * self._settings.tokens
        return Go(num_tokens=num_tokens, seconds=seconds, client_s=own,
                  engines=engine_cpu(self._engine.process.pid) - before)  # fmt: skip

    async def _ask(self, http: httpx.AsyncClient, group: Sequence[Any]) -> Any:
        body = {
            "model": SERVED_MODEL_NAME, "prompt": list(group[0].prompt_token_ids), "n": len(group),
            "seed": group[0].seed, "temperature": 1.0, "max_tokens": self._settings.tokens, "logprobs": 0,
            "return_token_ids": True, "skip_special_tokens": False,
        }  # fmt: skip
        return (await http.post("/v1/completions", json=body)).raise_for_status().json()


def _arguments() -> tuple[ThroughputSettings, Path | None]:
    parser = argparse.ArgumentParser(description="Compare ways to have one engine write completions.")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--model-shape", default="tiny")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    settings = ThroughputSettings(
        model_shape=arguments.model_shape, device=arguments.device, num_samples=arguments.samples, num_generations=8,
        tokens=arguments.tokens, prompt_tokens=64, repeats=arguments.repeats,
    )  # fmt: skip
    return settings, arguments.output


if __name__ == "__main__":
    main()
