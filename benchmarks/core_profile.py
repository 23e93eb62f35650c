"""Where the time of an engine's decode steps goes: Python by function, and the GPU by kernel.

    python benchmarks/core_profile.py [--shape 1.7b] [--samples 256] [--tokens 256] [--device cuda]

Core, worker and scheduler run in this process (no front end, no encoding), with dummy weights and a seed for every
sample. Three goes: one to warm up, one measured alone, one under cProfile; on GPUs a fourth, short one under torch's
profiler, whose sum of kernels over the steps is what the GPU would need if nothing held it up.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import random
import tempfile
import time
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

import torch
from vllm import LLM

from shoal import vllm_compat
from shoal.bench.shapes import SHAPES, qwen3_config, shape_name
from shoal.testing import tiny_tokenizer
from shoal.vllm_plugin.scheduler import PATH


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=shape_name, default="qwen3-1.7b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--stock", action="store_true", help="with vLLM's own scheduler")
    parser.add_argument("--unseeded", action="store_true", help="without a seed for each sample")
    settings = parser.parse_args()
    writer = _make_writer(settings)
    core = writer.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    print("runner", type(worker.model_runner).__module__, "scheduler", type(core.scheduler).__mro__[:3])
    print("graphs", core.vllm_config.compilation_config.cudagraph_mode, "executor", type(core.model_executor).__name__)
    _go(writer, settings, settings.tokens)
    wall_s, cpu_s = _go(writer, settings, settings.tokens)
    num_tokens = settings.samples * settings.tokens
    print(
        f"{num_tokens / wall_s:,.0f} tokens/s, {wall_s / settings.tokens * 1e3:.2f} ms a step, "
        f"{cpu_s / num_tokens * 1e6:.1f} s of CPU for a million tokens"
    )
    profile = cProfile.Profile()
    profile.enable()
    _go(writer, settings, settings.tokens)
    profile.disable()
    for order, count in (("tottime", 45), ("cumtime", 75)):
        pstats.Stats(profile).strip_dirs().sort_stats(order).print_stats(count)
    if settings.device == "cuda":
        _profile_gpu(writer, settings)


def _profile_gpu(writer: Any, settings: argparse.Namespace, num_tokens: int = 40) -> None:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        wall_s, _ = _go(writer, settings, num_tokens)
    averages = profile.key_averages()
    total_ms = sum(event.self_device_time_total for event in averages) / 1e3
    print(
        f"{total_ms / num_tokens:.2f} ms of kernels a step (the prefill's too), {wall_s / num_tokens * 1e3:.2f} in all"
    )
    print(averages.table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=90))


def _make_writer(settings: argparse.Namespace) -> Any:
    shape = SHAPES[settings.shape]
    options: dict[str, Any] = {} if settings.stock else {"scheduler_cls": PATH}
    if settings.device == "cpu":
        options |= {"enforce_eager": True, "enable_chunked_prefill": False, "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        qwen3_config(shape).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return LLM(
            model=folder, load_format="dummy", seed=0, max_model_len=shape.max_tokens, max_num_seqs=settings.samples,
            logprobs_mode="processed_logprobs", generation_config="vllm", **options,
        )  # fmt: skip


def _go(writer: Any, settings: argparse.Namespace, num_tokens: int) -> tuple[float, float]:
    prompts, params = [], []
    for seed in range(settings.samples):
        prompts.append({"prompt_token_ids": random.Random(seed).choices(range(3, 300), k=64)})
        sampling = {"temperature": 1.0, "max_tokens": num_tokens, "ignore_eos": True}
        params.append(vllm_compat.sampling_params(sampling, seed=seed, flush_tokens=0, is_held=not settings.stock))
        if settings.unseeded:
            params[-1].seed = None
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    outputs = writer.generate(prompts, params, use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


if __name__ == "__main__":
    main()
