"""What each decode step of a running engine's core goes to: planning, launching, waiting for the GPU, taking in.

    python benchmarks/core_steps.py [--shape 1.4b] [--samples 128] [--tokens 1024] [--ragged] [--stock]

The core runs in its own process, as in a server, with dummy weights. Where it waits for the GPU, the GPU decides how
long a step takes; where it does not, the core's own Python does. The last line is one JSON object: the seconds of each
go, and for each number of requests that run the median milliseconds of a step's pieces.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from core_cpu import write_completion
from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.uniproc_executor import AsyncOutputFuture, UniProcExecutor

from shoal import vllm_compat
from shoal.bench.shapes import SHAPES, qwen3_config, shape_name
from shoal.testing import tiny_tokenizer
from shoal.vllm_plugin.scheduler import make_scheduler

_STEPS_PATH, _STOCK, _INTERVAL_S = "SHOAL_BENCH_STEPS_PATH", "SHOAL_BENCH_STOCK", "SHOAL_BENCH_INTERVAL_S"
_PIECES = ("schedule", "execute", "sample", "wait", "update", "rest")
_BUCKET = 16
_PAUSE_S = 0.5


class StepClock:
    """Times the pieces of each step of this process's core.

    Args:
        path: Where it writes the steps, whenever nobody runs any more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._steps: list[tuple[int, ...]] = []
        self._pieces: dict[str, int] = defaultdict(int)
        self._began = time.perf_counter_ns()

    def timed(self, piece: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same call, whose time counts for a piece."""

        def run(*args: Any, **options: Any) -> Any:
            began = time.perf_counter_ns()
            try:
                return call(*args, **options)
            finally:
                self._pieces[piece] += time.perf_counter_ns() - began

        return run

    def end_step(self, num_running: int) -> None:
        """Note a step that has been taken in."""
        now = time.perf_counter_ns()
        pieces = [self._pieces.pop(piece, 0) for piece in _PIECES[:-1]]
        self._steps.append((num_running, *pieces, now - self._began - sum(pieces)))
        self._began = now
        if not num_running:
            with self._path.open("a") as file:
                file.write(json.dumps(self._steps) + "\n")
            self._steps = []


def scheduler(**arguments: Any) -> Any:
    """Return the engine's scheduler, timed, and time its executor."""
    config = arguments["vllm_config"]
    made = vllm_compat.scheduler_class(config)(**arguments) if _STOCK in os.environ else make_scheduler(**arguments)
    if interval_s := os.environ.get(_INTERVAL_S):
        made.interval_s = float(interval_s)
    clock = StepClock(Path(os.environ[_STEPS_PATH]))
    made.schedule = clock.timed("schedule", made.schedule)
    update = clock.timed("update", made.update_from_output)

    def update_from_output(*args: Any) -> Any:
        messages = update(*args)
        clock.end_step(len(made.running))
        return messages

    made.update_from_output = update_from_output
    for kind, name, piece in (
        (UniProcExecutor, "execute_model", "execute"),
        (UniProcExecutor, "sample_tokens", "sample"),
        (AsyncOutputFuture, "result", "wait"),
    ):
        setattr(kind, name, clock.timed(piece, getattr(kind, name)))
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=shape_name, default="qwen3-1.4b")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--ragged", action="store_true", help="16 tokens to as many")
    parser.add_argument("--goes", type=int, default=3)
    parser.add_argument("--stock", action="store_true", help="with vLLM's own scheduler")
    parser.add_argument("--interval-s", type=float, help="of Shoal's scheduler, between two messages")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps"
        os.environ |= {
            "VLLM_NO_USAGE_STATS": "1", _STEPS_PATH: str(path),
            "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        }  # fmt: skip
        if settings.stock:
            os.environ[_STOCK] = "1"
        if settings.interval_s is not None:
            os.environ[_INTERVAL_S] = str(settings.interval_s)
        qwen3_config(SHAPES[settings.shape]).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        seconds = asyncio.run(_write_all(folder, settings))
        written = [json.loads(line) for line in path.read_text().splitlines()]
    found = _by_running(step for steps in written for step in steps)
    print(f"{statistics.median(seconds):.2f} s a go; medians in ms\n{'running':>9}{'steps':>7}{'step':>8}", end="")
    print("".join(f"{piece:>10}" for piece in _PIECES))
    for bucket, (count, step, *pieces) in sorted(found.items(), reverse=True):
        print(f"{bucket:>5}-{bucket + _BUCKET - 1:<3}{count:>7}{step:>8.2f}" + "".join(f"{ms:>10.3f}" for ms in pieces))
    print(json.dumps({"seconds": seconds, "by_running": found, "settings": vars(settings)}))
    sys.stdout.flush()
    os._exit(0)  # vLLM's core is a child that must not be waited for


async def _write_all(folder: str, settings: argparse.Namespace) -> list[float]:
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=folder, load_format="dummy", max_model_len=SHAPES[settings.shape].max_tokens,
            max_num_seqs=settings.samples, logprobs_mode="processed_logprobs", generation_config="vllm",
            scheduler_cls="core_steps.scheduler",
        )
    )  # fmt: skip
    seconds = []
    for go in range(-1, settings.goes):
        began = time.perf_counter()
        await asyncio.gather(*(_write(engine, go, index, settings) for index in range(settings.samples)))
        seconds.append(time.perf_counter() - began)
        await asyncio.sleep(_PAUSE_S)  # the core writes its steps down
        if go < 0:  # the first one warms up
            seconds.clear()
            Path(os.environ[_STEPS_PATH]).unlink()
    engine.shutdown()
    return seconds


async def _write(engine: Any, go: int, index: int, settings: argparse.Namespace) -> None:
    draw = random.Random(go * 1000 + index)
    num_tokens = draw.randint(16, settings.tokens) if settings.ragged else settings.tokens
    await write_completion(engine, f"{go}-{index}", num_tokens, draw=draw, seed=index, is_held=not settings.stock)


def _by_running(steps: Iterable[tuple[int, ...]]) -> dict[int, list[float]]:
    """Return for the first number of each bucket: steps, and the median milliseconds of a step and of its pieces."""
    buckets: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for num_running, *pieces in steps:
        if num_running:
            buckets[(num_running - 1) // _BUCKET * _BUCKET + 1].append((sum(pieces), *pieces))
    return {
        bucket: [len(found), *(round(statistics.median(values) / 1e6, 4) for values in zip(*found, strict=True))]
        for bucket, found in buckets.items()
    }


if __name__ == "__main__":
    main()
