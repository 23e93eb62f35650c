"""Our scheduler under vLLM's GPU runner, which schedules a step ahead: every token arrives, also after preemptions.

Run on a machine with NVIDIA GPUs: `pytest tests/gpu`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.engines.client import EngineClient
from shoal.engines.command import EngineSpec
from shoal.engines.fleet import Fleet
from shoal.engines.process import choose_ports
from shoal.types import Rollout, RolloutRequest, SamplingSettings

NUM_SAMPLES, NUM_TOKENS = 32, 150

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no NVIDIA GPU on this machine"),
]


def test_every_token_arrives_after_preemptions_too_and_a_seed_decides(policy: tuple[Any, Path], tmp_path: Path) -> None:
    """Cache blocks for 20 of the 32 samples at their full length; every two samples have one seed."""
    (port,) = choose_ports(1, None)
    spec = EngineSpec(
        name="engine-0", model_dir=policy[1], port=port, cuda_devices=("0",), cpu_cores=(), tensor_parallel_size=1,
        pipeline_parallel_size=1, dtype="bfloat16", max_model_len=256, gpu_memory_utilization=0.3, cpu_kv_cache_gib=1,
        seed=0, extra_arguments={"num-gpu-blocks-override": 220, "block-size": 16},
    )  # fmt: skip
    sampling = SamplingSettings(temperature=1.0, max_tokens=NUM_TOKENS, stop_token_ids=())

    async def run(client: EngineClient) -> tuple[list[Rollout], int]:
        requests = [
            RolloutRequest(prompt_token_ids=tuple(range(3, 23)), seed=index // 2, sampling=sampling)
            for index in range(NUM_SAMPLES)
        ]
        try:
            return await asyncio.gather(*map(client.generate, requests)), (await client.report()).num_preemptions
        finally:
            await client.aclose()

    with Fleet.start([spec], log_dir=tmp_path / "logs", timeout_s=600, request_timeout_s=120) as fleet:
        rollouts, num_preemptions = asyncio.run(run(fleet.engines[0].client))
        log = (tmp_path / "logs" / "engine-0.log").read_text()
    assert "which costs speed" not in log
    assert num_preemptions > 0
    assert all(rollout.finish_reason == "length" for rollout in rollouts)
    assert all(len(rollout.token_ids) == len(rollout.rollout_logprobs) == NUM_TOKENS for rollout in rollouts)
    assert all(np.all(rollout.rollout_logprobs <= 0) for rollout in rollouts)
    starts = [rollout.token_ids[:4].tolist() for rollout in rollouts]  # before rounding can tell two rows apart
    assert starts[::2] == starts[1::2]
    assert len({str(start) for start in starts}) > NUM_SAMPLES // 4
