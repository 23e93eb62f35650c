"""Publishes to real engines on real GPUs: over NCCL and CUDA IPC to another GPU, and by CUDA IPC to the trainer's own.

Run on a machine with NVIDIA GPUs: `pytest tests/gpu`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.engines.command import LOOPBACK, EngineSpec
from shoal.engines.fleet import Fleet
from shoal.engines.process import choose_ports
from shoal.trainer.exchange import Exchange
from shoal.types import Rollout, RolloutRequest, SamplingSettings
from shoal.weights.group import EngineAddress, PublishSettings
from shoal.weights.publisher import WeightPublisher
from shoal.weights.sources import make_source
from shoal.wire.transport import Backend

NUM_GPUS = torch.cuda.device_count()
PROMPT = tuple(range(10, 60))
TIMEOUT_S = 120.0

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS == 0, reason="no NVIDIA GPU on this machine")]


@pytest.mark.parametrize("verify", ["digest", "full"])
@pytest.mark.parametrize(
    ("devices", "backend", "num_needed"),
    [
        pytest.param(("1",), "nccl", 2, id="NCCL to another GPU"),
        pytest.param(("1",), "ipc", 2, id="CUDA IPC to another GPU"),
        pytest.param(("0",), "ipc", 1, id="CUDA IPC on the trainer's own GPU"),
        pytest.param(("0", "1"), "ipc", 2, id="CUDA IPC, TP 2 over both GPUs"),
    ],
)
def test_an_engine_computes_with_what_was_published(
    policy: tuple[Any, Path], devices: tuple[str, ...], backend: Backend, num_needed: int, verify: Any, tmp_path: Path
) -> None:
    if num_needed > NUM_GPUS:
        pytest.skip(f"needs {num_needed} GPUs, found {NUM_GPUS}")
    model, folder = policy
    opened = tuple({"0"} - set(devices)) if backend == "ipc" else ()
    with _fleet(folder, devices, opened, tmp_path) as fleet:
        (engine,) = fleet.engines
        publisher = WeightPublisher(
            {"model": make_source(model)},
            [EngineAddress(client=engine.client, num_workers=len(devices), backend=backend)],
            ranks=Exchange(rank=0, world_size=1),
            device=torch.device("cuda:0"),
            settings=PublishSettings(host=LOOPBACK, timeout_s=TIMEOUT_S, verify=verify),
        )
        publisher.connect()
        texts = []
        loop = asyncio.new_event_loop()
        for version in range(3):
            assert publisher.publish(version).num_digests > 0
            rollout = loop.run_until_complete(engine.client.generate(_request()))
            texts.append(rollout.token_ids.tolist())
            assert _difference(model, rollout) < 0.06
            _change(model)
            # The control: against other weights the same tokens have clearly other logprobs.
            assert _difference(model, rollout) > 0.2
        assert texts[0] != texts[1] != texts[2]
        loop.run_until_complete(engine.client.aclose())
        loop.close()
        publisher.close()


def _fleet(folder: Path, devices: tuple[str, ...], opened: tuple[str, ...], log_dir: Path) -> Fleet:
    (port,) = choose_ports(1, None)
    spec = EngineSpec(
        name="engine-0",
        model_dir=folder,
        port=port,
        cuda_devices=devices,
        opened_devices=opened,
        cpu_cores=(),
        tensor_parallel_size=len(devices),
        pipeline_parallel_size=1,
        dtype="bfloat16",
        max_model_len=256,
        gpu_memory_utilization=0.2,
        cpu_kv_cache_gib=1,
        seed=0,
        extra_arguments={"enforce-eager": True},
    )
    return Fleet.start([spec], log_dir=log_dir, timeout_s=400.0, request_timeout_s=60.0)


def _request() -> RolloutRequest:
    sampling = SamplingSettings(temperature=1.0, max_tokens=32, stop_token_ids=(2,))
    return RolloutRequest(prompt_token_ids=PROMPT, seed=7, sampling=sampling)


@torch.no_grad()
def _difference(model: Any, rollout: Rollout) -> float:
    """Return the mean difference of logprobs, engine to transformers; both compute in bfloat16."""
    ids = torch.tensor([[*PROMPT, *rollout.token_ids.tolist()]], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(PROMPT) - 1 : -1].float()
    logprobs = logits.log_softmax(-1).gather(1, ids[0, len(PROMPT) :, None])[:, 0].cpu()
    return float((logprobs - torch.from_numpy(rollout.rollout_logprobs)).abs().mean())


@torch.no_grad()
def _change(model: Any) -> None:
    for value in model.parameters():
        value.add_(torch.randn_like(value) * 0.02)
