"""Processor time of an engine's core and front end without any model: vLLM's scheduler against ours.

    python benchmarks/core_cpu.py [--samples 256] [--tokens 200] [--goes 3] [--kinds vllm,both,ours] [--options JSON]

The core runs in its own process as always, and schedules asynchronously as on GPUs, but an executor
without workers answers each step with random tokens at once. The last line is one JSON object: seconds for a million
tokens, a list of goes for each kind and process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

from shoal import vllm_compat
from shoal.bench.shapes import SHAPES, qwen3_config
from shoal.testing import tiny_tokenizer
from shoal.vllm_plugin.scheduler import HoldingScheduler, make_scheduler

VOCABULARY = SHAPES["tiny"].vocabulary
_KIND = "SHOAL_BENCH_CORE_KIND"


class NullExecutor(Executor):
    """Has no worker."""

    supports_pp = True

    def _init_executor(self) -> None:
        self.vllm_config.scheduler_config.async_scheduling = True  # which vLLM refuses on CPUs

    def collective_rpc(self, method: Any, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        """Answer as one worker with one layer and 1 GiB would."""
        spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
        answers = {
            "get_kv_cache_spec": {"layer": spec},
            "determine_available_memory": 1 << 30,
            "get_supported_tasks": ("generate",),
            "get_supported_kv_cache_layouts": ["LBNHC"],
        }
        return [answers.get(method)]

    def initialize_from_config(self, kv_cache_configs: Any) -> None:
        """Allocate nothing."""

    def compile_or_warm_up_model(self) -> None:
        """Compile nothing."""

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """Say that a step may be asked for before the one before it is fetched."""
        return True

    def check_health(self) -> None:
        """Be healthy."""

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Take a step in."""
        self._step = scheduler_output
        is_empty = scheduler_output.total_num_scheduled_tokens == 0
        return _done(ModelRunnerOutput(req_ids=[], req_id_to_index={}) if is_empty else None)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """Return a token for each request of the step."""
        names = list(self._step.num_scheduled_tokens)
        tokens = np.random.randint(3, VOCABULARY, (len(names), 1), dtype=np.int32)
        return _done(
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=tokens.tolist(),
                logprobs=LogprobsLists(
                    tokens, np.random.rand(len(names), 1).astype(np.float32), np.zeros(len(names), dtype=np.int32)
                ),
                prompt_logprobs_dict={},
            )
        )


def vllm(base: Any, arguments: Any) -> Any:
    """Return vLLM's scheduler."""
    return base(**arguments)


def holds(base: Any, arguments: Any) -> Any:
    """Return a scheduler that holds outputs, is told of every token and looks after blocks as vLLM does."""
    return type("Holding", (HoldingScheduler, base), {})(**arguments)


def blocks(base: Any, arguments: Any) -> Any:
    """Return vLLM's scheduler, which looks after blocks when they are full."""
    scheduler = base(**arguments)
    vllm_compat.skip_idle_block_work(scheduler)
    return scheduler


def both(base: Any, arguments: Any) -> Any:
    """Return a scheduler that does both, and is told of every token."""
    scheduler = holds(base, arguments)
    vllm_compat.skip_idle_block_work(scheduler)
    return scheduler


def ours(base: Any, arguments: Any) -> Any:
    """Return Shoal's."""
    return make_scheduler(**arguments)


KINDS = {make.__name__: make for make in (vllm, holds, blocks, both, ours)}


def scheduler(**arguments: Any) -> Any:
    """Return the scheduler of the kind that is measured, for a runner that keeps tokens itself, as on GPUs."""
    config = arguments["vllm_config"]
    type(config).use_v2_model_runner, type(config)._validate_v2_model_runner = True, lambda self: None  # not on CPUs
    base = vllm_compat.scheduler_class(config)
    return KINDS[os.environ[_KIND]](base, arguments)


def main() -> None:
    """Measure one kind after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--goes", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--options", type=json.loads, default={}, help="further engine arguments, as JSON")
    settings = parser.parse_args()
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        qwen3_config(SHAPES["tiny"]).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        print(json.dumps({kind: asyncio.run(_measure(kind, folder, settings)) for kind in settings.kinds.split(",")}))
    sys.stdout.flush()
    os._exit(0)  # vLLM's core is a child that must not be waited for


async def _measure(kind: str, folder: str, settings: argparse.Namespace) -> dict[str, list[float]]:
    os.environ[_KIND] = kind
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=folder, load_format="dummy", dtype="float32", max_model_len=512, max_num_seqs=settings.samples,
            block_size=16, logprobs_mode="processed_logprobs", generation_config="vllm", enforce_eager=True,
            enable_chunked_prefill=False, scheduler_cls="core_cpu.scheduler",
            distributed_executor_backend="core_cpu.NullExecutor", **settings.options,
        )
    )  # fmt: skip
    front_end = psutil.Process()
    (core,) = (child for child in front_end.children(recursive=True) if vllm_compat.computes(" ".join(child.cmdline())))
    result: dict[str, list[float]] = {"core": [], "front_end": [], "wall": []}
    for go in range(-1, settings.goes):
        before = _cpu(core), _cpu(front_end), time.perf_counter()
        await asyncio.gather(
            *(
                write_completion(
                    engine, f"{go}-{index}", settings.tokens,
                    draw=random.Random(go * 1000 + index), seed=index, is_held=kind not in ("vllm", "blocks"),
                )
                for index in range(settings.samples)
            )
        )  # fmt: skip
        after = _cpu(core), _cpu(front_end), time.perf_counter()
        if go >= 0:  # the first one warms up
            for values, start, end in zip(result.values(), before, after, strict=True):
                values.append(round((end - start) / (settings.samples * settings.tokens) * 1e6, 2))
    print(kind, result, file=sys.stderr, flush=True)
    engine.shutdown()
    return result


async def write_completion(
    engine: Any, name: str, num_tokens: int, *, draw: random.Random, seed: int, is_held: bool
) -> None:
    """Have an engine write one completion, of a prompt of 64 tokens that is drawn, and see that it has its length."""
    params = vllm_compat.sampling_params(
        {"temperature": 1.0, "max_tokens": num_tokens, "ignore_eos": True},
        seed=seed,
        flush_tokens=64,
        is_held=is_held,
    )
    prompt = draw.choices(range(3, VOCABULARY), k=64)
    pieces = vllm_compat.write(engine, prompt, params, name=name, adapter=None, cache_salt="")
    written = [len(piece.token_ids) async for piece in pieces]
    assert sum(written) == num_tokens, written


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


if __name__ == "__main__":
    main()
