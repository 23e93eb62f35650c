"""`shoal bench rollouts`: completions of real engines through the pool, beside `vllm.LLM.generate` on the same work."""

from __future__ import annotations

import asyncio
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shoal.bench.children import StageError
from shoal.bench.engine_cpu import EngineCpu, engine_cpu
from shoal.bench.in_process import measure_in_process
from shoal.bench.model import write_engine_folder
from shoal.bench.results import store
from shoal.bench.settings import engine_specs
from shoal.bench.throughput_settings import ThroughputSettings, draw_groups
from shoal.engines.client import FLUSH_TOKENS, EngineClient
from shoal.engines.fleet import Fleet, ManagedEngine
from shoal.engines.process import EngineProcess
from shoal.observe.summary import versions
from shoal.placement.devices import Device
from shoal.rollout.dispatch import DispatchSettings
from shoal.rollout.pool import EnginePool, PoolSettings

IN_PROCESS_TIMEOUT_S = 1500.0
START_TIMEOUT_S = 900.0
REQUEST_TIMEOUT_S = 900.0
_STALL_S = 120.0
_MILLION = 1e6
_ROW = "{:<34}{:>14}{:>16}{:>16}{:>16}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Go:
    """One go at writing all completions.

    Attributes:
        num_tokens: Completion tokens written.
        seconds: From the first request to the last completion.
        client_s: Processor time of this process meanwhile.
        engines: Processor time of the engines meanwhile.
    """

    num_tokens: int
    seconds: float
    client_s: float
    engines: EngineCpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Medians of several goes; processor time in seconds for a million tokens."""

    tokens_per_s: float
    client_cpu_s: float
    frontend_cpu_s: float
    core_cpu_s: float

    @classmethod
    def of(cls, goes: Sequence[Go]) -> Figures:
        """Return the medians."""
        return cls(
            tokens_per_s=_median([go.num_tokens / go.seconds for go in goes]),
            client_cpu_s=_median([go.client_s / go.num_tokens * _MILLION for go in goes]),
            frontend_cpu_s=_median([go.engines.front_end / go.num_tokens * _MILLION for go in goes]),
            core_cpu_s=_median([go.engines.core / go.num_tokens * _MILLION for go in goes]),
        )


def run_throughput(settings: ThroughputSettings, devices: tuple[Device, ...], output: Path | None) -> dict[str, Any]:
    """Measure, print and store; return what the last line says.

    Args:
        settings: What is measured, checked.
        devices: The GPUs that this process may use.
        output: Where the results go; None for the usual place.

    Raises:
        StageError: Completions were not as long as they had to be.
        EngineError: An engine failed.
    """
    folder = Path(tempfile.mkdtemp(prefix="shoal-bench-"))
    write_engine_folder(settings.engines(1), folder / "model", has_end=False)
    print(
        f"{settings.model_shape} with dummy weights on {settings.device}: {settings.num_samples} completions of "
        f"{settings.tokens} tokens for an engine, {settings.num_generations} of each prompt of "
        f"{settings.prompt_tokens} tokens; medians of {settings.repeats}"
    )
    print(_ROW.format("", "tokens/s", "client CPU s/M", "front end s/M", "engine core s/M"))
    reasons: dict[str, str] = {}
    samples: dict[str, Any] = {}
    in_process = _in_process(settings, folder, devices, reasons, samples)
    one, stock, two = _with_engines(settings, folder, devices, samples)
    if two is None:
        reasons["ratio_two_engines"] = reason = f"two engines need two GPUs, and this process sees {len(devices)}"
        print(f"no two engines: {reason}")
    data = _summary(settings, in_process, one, stock, two)
    data |= {
        "settings": asdict(settings),
        "versions": versions(),
        "devices": [device.name for device in devices[:2]] or ["CPU"],
        "platform": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "samples": samples,
        "reasons": reasons,
    }
    path = output or _default_path(settings)
    store(path, data)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"stored in {path}")
    print(json.dumps(data))
    return data


class Writer:
    """Writes goes with some engines, through the pool, one after the other.

    Args:
        engines: Whose processor time counts.
        clients: One for each of them. Their asynchronous half is used up by this.
        settings: What is written.
    """

    def __init__(
        self, engines: Sequence[ManagedEngine], clients: Sequence[EngineClient], settings: ThroughputSettings
    ) -> None:
        self._engines = engines
        self._clients = clients
        self._settings = settings

    def write(self, first_go: int) -> list[Go]:
        """Write one go to warm up and then those that count."""
        return asyncio.run(self._write(first_go))[1:]

    async def _write(self, first_go: int) -> list[Go]:
        dispatch = DispatchSettings(max_in_flight=self._settings.num_samples, affinity_margin=2)
        pool = EnginePool(self._clients, PoolSettings(dispatch=dispatch, stall_s=_STALL_S))
        # What the engines hold is not looked at here: dummy weights, of which all goes are alike.
        pool.publishing(0)
        pool.proven(0, [client.name for client in self._clients])
        try:
            async with pool.watching():
                return [await self._go(pool, first_go + number) for number in range(self._settings.repeats + 1)]
        finally:
            for client in self._clients:
                await client.aclose()

    async def _go(self, pool: EnginePool, number: int) -> Go:
        groups = draw_groups(self._settings, go=number, num_engines=len(self._engines))
        before = self._cpu()
        own, began = time.process_time(), time.perf_counter()
        rollouts = await asyncio.gather(*(pool.generate_group(group) for group in groups))
        seconds, own = time.perf_counter() - began, time.process_time() - own
        lengths = [len(rollout.token_ids) for group in rollouts for rollout in group]
        if set(lengths) != {self._settings.tokens}:
            raise StageError(f"completions of {min(lengths)} to {max(lengths)} tokens, not {self._settings.tokens}")
        return Go(num_tokens=sum(lengths), seconds=seconds, client_s=own, engines=self._cpu() - before)

    def _cpu(self) -> EngineCpu:
        # All were started on this host.
        pids = [engine.process.pid for engine in self._engines if isinstance(engine.process, EngineProcess)]
        return sum(map(engine_cpu, pids), EngineCpu(front_end=0.0, core=0.0))


def new_client(
    engine: ManagedEngine, api_key: str, *, has_plugin: bool, flush_tokens: int = FLUSH_TOKENS
) -> EngineClient:
    """Return one more client of a managed engine; without the plugin it asks by `/v1/completions`, as a stock one's."""
    return EngineClient(
        name=engine.name,
        url=engine.client.url,
        api_key=api_key,
        log_path=engine.client.log_path,
        request_timeout_s=REQUEST_TIMEOUT_S,
        has_plugin=has_plugin,
        flush_tokens=flush_tokens,
    )


def _in_process(
    settings: ThroughputSettings,
    folder: Path,
    devices: tuple[Device, ...],
    reasons: dict[str, str],
    samples: dict[str, Any],
) -> float | None:
    try:
        seconds = measure_in_process(settings, folder, devices, IN_PROCESS_TIMEOUT_S)
    except StageError as error:
        reasons["in_process_tokens_per_s"] = str(error)
        print(f"no vllm.LLM.generate: {error}")
        return None
    samples["in_process_s"] = seconds
    rate = settings.num_samples * settings.tokens / _median(seconds)
    print(_ROW.format("vllm.LLM.generate", f"{rate:,.0f}", "", "", ""))
    return rate


def _with_engines(
    settings: ThroughputSettings, folder: Path, devices: tuple[Device, ...], samples: dict[str, Any]
) -> tuple[Figures, Figures, Figures | None]:
    """Return the figures of one engine by our route, by the one that every vLLM server has, and of two engines."""
    num_engines = 1 if settings.device == "cuda" and len(devices) < 2 else 2
    with ExitStack() as stack:
        fleet = stack.enter_context(_start(settings, num_engines, folder, devices))
        first, *others = fleet.engines
        # With a client of its own for each part: their asynchronous half is used up.
        direct = stack.enter_context(closing(new_client(first, fleet.api_key, has_plugin=True)))
        stock = stack.enter_context(closing(new_client(first, fleet.api_key, has_plugin=False)))
        one = _keep("one engine", Writer([first], [direct], settings).write(0), samples)
        goes = Writer([first], [stock], settings).write(settings.repeats + 1)
        by_stock = _keep("one engine, /v1/completions", goes, samples)
        if not others:
            return one, by_stock, None
        both = Writer(fleet.engines, [engine.client for engine in fleet.engines], settings)
        goes = both.write(2 * (settings.repeats + 1))
        return one, by_stock, _keep("two engines, twice the work", goes, samples)


def _start(settings: ThroughputSettings, num_engines: int, folder: Path, devices: tuple[Device, ...]) -> Fleet:
    return Fleet.start(
        engine_specs(settings.engines(num_engines), folder, devices),
        log_dir=folder / f"logs-{num_engines}",
        timeout_s=START_TIMEOUT_S,
        request_timeout_s=REQUEST_TIMEOUT_S,
    )


def _keep(title: str, goes: Sequence[Go], samples: dict[str, Any]) -> Figures:
    samples[title] = [asdict(go) for go in goes]
    figures = Figures.of(goes)
    print(
        _ROW.format(
            title,
            f"{figures.tokens_per_s:,.0f}",
            f"{figures.client_cpu_s:.2f}",
            f"{figures.frontend_cpu_s:.1f}",
            f"{figures.core_cpu_s:.1f}",
        )
    )
    return figures


def _summary(
    settings: ThroughputSettings, in_process: float | None, one: Figures, stock: Figures, two: Figures | None
) -> dict[str, Any]:
    return {
        "benchmark": "rollouts",
        "kind": "engines",
        "weights": "dummy",
        "tokens_per_s": round(one.tokens_per_s, 1),
        "in_process_tokens_per_s": None if in_process is None else round(in_process, 1),
        "ratio_to_in_process": None if in_process is None else round(one.tokens_per_s / in_process, 4),
        "ratio_two_engines": None if two is None else round(two.tokens_per_s / one.tokens_per_s, 4),
        "client_cpu_s_per_million_tokens": round(one.client_cpu_s, 3),
        "frontend_cpu_s_per_million_tokens": round(one.frontend_cpu_s, 2),
        "core_cpu_s_per_million_tokens": round(one.core_cpu_s, 2),
        "stock_tokens_per_s": round(stock.tokens_per_s, 1),
        "stock_client_cpu_s_per_million_tokens": round(stock.client_cpu_s, 3),
        "stock_frontend_cpu_s_per_million_tokens": round(stock.frontend_cpu_s, 2),
        "num_tokens": settings.num_samples * settings.tokens,
    }


def _default_path(settings: ThroughputSettings) -> Path:
    date = datetime.now(UTC).date().isoformat()
    return Path("benchmarks/results") / f"{date}-rollouts-{settings.model_shape}-{settings.device}.json"


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)
