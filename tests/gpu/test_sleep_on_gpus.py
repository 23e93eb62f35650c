"""Engines that sleep on the trainer's own GPU: what they write afterwards, and how much memory there is meanwhile.

Run on a machine with NVIDIA GPUs: `pytest tests/gpu`.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.engines.command import LOOPBACK, EngineSpec
from shoal.engines.fleet import Fleet
from shoal.engines.process import choose_ports
from shoal.trainer.exchange import Exchange
from shoal.trainer.optimizer_offload import OptimizerOffload
from shoal.types import Rollout, RolloutRequest, SamplingSettings
from shoal.weights.group import EngineAddress, PublishSettings
from shoal.weights.publisher import WeightPublisher
from shoal.weights.sources import make_source

NUM_GPUS = torch.cuda.device_count()
PROMPTS = (tuple(range(10, 60)), tuple(range(70, 90)), (5,), tuple(range(3, 200)))
NUM_TOKENS = 32
SHARE = 0.3
# What an engine keeps while it sleeps: its CUDA context, kernels and graphs, not the weights and the KV cache.
KEPT_BYTES = 3 << 30

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS == 0, reason="no NVIDIA GPU on this machine")]


@pytest.fixture(scope="module", params=[False, True], ids=["with CUDA graphs", "eager"])
def fleet(policy: tuple[Any, Path], request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Fleet]:
    (port,) = choose_ports(1, None)
    spec = EngineSpec(
        name="engine-0",
        model_dir=policy[1],
        port=port,
        cuda_devices=("0",),
        cpu_cores=(),
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        dtype="bfloat16",
        max_model_len=256,
        gpu_memory_utilization=SHARE,
        cpu_kv_cache_gib=1,
        seed=0,
        extra_arguments={"enforce-eager": True} if request.param else {},
        sleeps=True,
    )
    with Fleet.start([spec], log_dir=tmp_path_factory.mktemp("log"), timeout_s=600.0, request_timeout_s=60.0) as fleet:
        yield fleet


def test_after_each_of_three_nights_an_engine_computes_with_what_was_published_and_its_memory_was_free(
    policy: tuple[Any, Path], fleet: Fleet
) -> None:
    model, _ = policy
    (engine,) = fleet.engines
    publisher = WeightPublisher(
        {"model": make_source(model)},
        [EngineAddress(client=engine.client, num_workers=1, backend="ipc", sleeps=True)],
        ranks=Exchange(rank=0, world_size=1),
        device=torch.device("cuda:0"),
        settings=PublishSettings(host=LOOPBACK, timeout_s=120.0),
    )
    publisher.connect()
    loop = asyncio.new_event_loop()
    total = torch.cuda.mem_get_info(0)[1]
    first = [value.detach().clone() for value in model.parameters()]
    for version in range(4):
        assert publisher.publish(version).num_digests > 0
        rollouts = loop.run_until_complete(_ask(engine.client))
        assert max(_difference(model, *pair) for pair in zip(PROMPTS, rollouts, strict=True)) < 0.06
        awake = _free_bytes()
        assert publisher.sleep().asleep == ("engine-0",)
        freed = _free_bytes() - awake
        # Weights and KV cache are what an engine's share is for; some of it goes to activations, which it keeps.
        assert freed > SHARE * total - KEPT_BYTES
        # The control: it can be used, all of it.
        held = torch.empty(freed - (1 << 30), dtype=torch.uint8, device="cuda:0").fill_(1)
        assert int(held[-1]) == 1
        del held
        _change(model, version)
        # The control: against other weights the same tokens have clearly other logprobs.
        assert min(_difference(model, *pair) for pair in zip(PROMPTS, rollouts, strict=True)) > 0.15
        _free_bytes()
    with torch.no_grad():  # the next one's too: weights that only grow make bfloat16's differences grow
        for value, former in zip(model.parameters(), first, strict=True):
            value.copy_(former)
    loop.run_until_complete(engine.client.aclose())
    loop.close()
    publisher.close()


def test_an_optimizers_states_leave_the_gpu_and_come_back_bit_for_bit() -> None:
    weight = torch.nn.Parameter(torch.randn(64 << 20, device="cuda:0"))
    for fused in (False, True):
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        optimizer.zero_grad()
        before = {name: value.clone() for name, value in optimizer.state[weight].items()}
        offload = OptimizerOffload(optimizer, torch.device("cuda:0"))
        free = _free_bytes()
        offload.park()
        assert _free_bytes() - free >= 2 * weight.nbytes
        offload.bring_back()
        assert all(torch.equal(optimizer.state[weight][name], value) for name, value in before.items())
        offload.close()


def _free_bytes() -> int:
    gc.collect()
    torch.cuda.synchronize(0)
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(0)[0])


async def _ask(client: Any) -> list[Rollout]:
    sampling = SamplingSettings(temperature=1.0, max_tokens=NUM_TOKENS, stop_token_ids=())
    requests = [RolloutRequest(prompt_token_ids=prompt, seed=7, sampling=sampling) for prompt in PROMPTS]
    return await asyncio.gather(*(client.generate(request) for request in requests))


@torch.no_grad()
def _difference(model: Any, prompt: tuple[int, ...], rollout: Rollout) -> float:
    """Return the mean difference of logprobs, engine to transformers; both compute in bfloat16."""
    ids = torch.tensor([[*prompt, *rollout.token_ids.tolist()]], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    logprobs = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
    return float((logprobs - torch.from_numpy(rollout.rollout_logprobs)).abs().mean())


@torch.no_grad()
def _change(model: Any, seed: int) -> None:
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for value in model.parameters():
        value.add_(0.02 * torch.randn(value.shape, generator=generator, device=value.device).to(value.dtype))
