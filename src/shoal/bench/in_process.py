"""The reference: `vllm.LLM.generate` writes the same completions, in a process of its own and with no server.

Run as `python -m shoal.bench.in_process ANSWER SETTINGS FOLDER`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal import vllm_compat
from shoal.bench.children import StageError, run_children
from shoal.bench.settings import engine_specs
from shoal.bench.shapes import SHAPES
from shoal.bench.throughput_settings import ThroughputSettings, draw_groups
from shoal.engines.command import serve_environment
from shoal.placement.devices import Device


def measure_in_process(
    settings: ThroughputSettings, folder: Path, devices: tuple[Device, ...], timeout_s: float
) -> list[float]:
    """Return the seconds of each go.

    Args:
        settings: What is written.
        folder: Holds the `model`.
        devices: The GPUs that this process may use.
        timeout_s: For all of it.

    Raises:
        StageError: It failed or hung.
    """
    (spec,) = engine_specs(settings.engines(1), folder, devices)
    environment = serve_environment(spec, "no server, no key", os.environ)
    answer: list[float] = run_children(
        "shoal.bench.in_process", [(settings.to_json(), str(folder))], timeout_s=timeout_s, environment=environment
    )
    return answer


def main(answer: str, settings_text: str, folder: str) -> None:
    """Write the completions again and again, and note how long it took."""
    settings = ThroughputSettings.from_json(settings_text)
    writer = _make_writer(settings, folder)
    seconds = []
    for go in range(-1, settings.repeats):
        requests = [request for group in draw_groups(settings, go=go + 1, num_engines=1) for request in group]
        params = [
            vllm_compat.sampling_params(asdict(request.sampling), seed=request.seed, flush_tokens=0)
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests]
        began = time.perf_counter()
        outputs = writer.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        if any(len(output.outputs[0].token_ids) != settings.tokens for output in outputs):
            raise StageError(f"completions are not all of {settings.tokens} tokens")
    Path(answer).write_text(json.dumps(seconds[1:]))  # the first one warmed up
    sys.stdout.flush()
    os._exit(0)  # vLLM's core is a child that must not be waited for


def _make_writer(settings: ThroughputSettings, folder: str) -> Any:
    from vllm import LLM

    options: dict[str, Any] = {}
    if settings.device == "cpu":
        options = {"enforce_eager": True, "enable_chunked_prefill": False}
    else:
        options = {"enforce_eager": settings.enforce_eager, "gpu_memory_utilization": settings.gpu_memory_utilization}
    return LLM(
        model=str(Path(folder) / "model"),
        load_format="dummy",
        dtype=settings.engines(1).dtype,
        seed=0,
        max_model_len=SHAPES[settings.model_shape].max_tokens,
        max_num_seqs=max(8, settings.num_samples),
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        **options,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
