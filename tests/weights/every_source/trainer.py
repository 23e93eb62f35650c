"""Trainers, one after the other, that each publish three times to engines that run already and compare what they write
with transformers.

    torchrun --nproc-per-node 2 trainer.py '{"sources": ["ddp", "fsdp2"], "engines": [...], ...}'

Says "fsdp2: published and equal", if that is so.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from architectures import change, make_model
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from shoal.engines.client import EngineClient
from shoal.engines.command import SERVED_MODEL_NAME
from shoal.testing import greedy_texts
from shoal.trainer.exchange import Exchange
from shoal.types import RolloutRequest, SamplingSettings
from shoal.weights.group import EngineAddress, PublishSettings
from shoal.weights.publisher import WeightPublisher
from shoal.weights.sources import AdapterSource, make_source
from shoal.wire.agreement import ADAPTER, MODEL

NUM_TOKENS = 24
EOS = 2
# The long one fills a block of the prefix cache (128 tokens on CPUs), whose keys and values a publish has to outdate.
PROMPTS = (
    tuple(range(70, 90)),
    (5,),
    tuple(3 + (7 * i) % 250 for i in range(60)),
    tuple(3 + i % 250 for i in range(200)),
)
CPU = torch.device("cpu")


def main() -> None:
    task = json.loads(sys.argv[1])
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=180))
    for source in task["sources"]:
        publish_three_times(source, task, rank=rank, num_ranks=num_ranks)
        if num_ranks > 1:
            dist.barrier()
        if rank == 0:
            print(f"{source}: published and equal", flush=True)
    if num_ranks > 1:
        dist.destroy_process_group()


def publish_three_times(source: str, task: dict[str, Any], *, rank: int, num_ranks: int) -> None:
    trained, reference = prepare(source, task["architecture"])
    engines = [engine for engine in task["engines"] if engine["serves_adapter"] or source != "adapter"]
    if source == "adapter":
        sources: Any = {MODEL: make_source(trained, merges_adapters=False), ADAPTER: AdapterSource(trained)}
    else:
        sources = {MODEL: make_source(trained)}
    clients = [
        EngineClient(
            name=engine["name"],
            url=engine["url"],
            api_key=engine["key"],
            log_path=Path(engine["log"]),
            request_timeout_s=90,
            model=engine["answers_as"] if source == "adapter" else SERVED_MODEL_NAME,
        )
        for engine in (engines if rank == 0 else [])
    ]
    publisher = WeightPublisher(
        sources,
        [
            EngineAddress(client=client, num_workers=engine["workers"], backend="gloo")
            for client, engine in zip(clients, engines, strict=False)
        ],
        ranks=Exchange(rank=rank, world_size=num_ranks),
        device=CPU,
        settings=PublishSettings(host="127.0.0.1", timeout_s=120, verify="full", batch_bytes=1 << 16),
    )
    publisher.connect()
    writers = [client for client, engine in zip(clients, engines, strict=False) if engine["writes_text"]]
    loop = asyncio.new_event_loop()
    texts: list[list[list[int]]] = []
    for version in range(3):
        if version:
            move(trained, reference, seed=version)
        report = publisher.publish(version)
        assert not report.lost and report.num_digests > 0, report
        if writers:
            wanted = greedy_texts(reference, PROMPTS, max_tokens=NUM_TOKENS, stop_token_id=EOS)
            for client, answers in zip(writers, loop.run_until_complete(ask(writers)), strict=True):
                assert answers == wanted, (version, client.name, answers, wanted)
            texts.append(wanted)
    if texts:
        # The control: every publish changed every text.
        assert all(a != b for one, two in ((0, 1), (1, 2)) for a, b in zip(texts[one], texts[two], strict=True)), texts
    publisher.close()
    for client in clients:
        loop.run_until_complete(client.aclose())
        client.close()
    loop.close()


def prepare(source: str, architecture: str) -> tuple[Any, Any]:
    """Return the model as it is trained, and one that transformers can generate with; they hold the same."""
    model = make_model(architecture, seed=1)
    if source == "plain":
        return model, model
    if source == "ddp":
        return DistributedDataParallel(model), model
    if source == "fsdp2":
        reference = copy.deepcopy(model)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh), reference
    if source == "zero3":
        return divided_by_deepspeed(model), copy.deepcopy(model)
    assert source in ("lora", "adapter")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if hasattr(model.model.layers[0].mlp, "down_proj"):
        targets += ["gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=targets)).eval()
    change(adapted, seed=100, scale=0.2)
    return adapted, adapted


def divided_by_deepspeed(model: Any) -> Any:
    """Return an engine of ZeRO-3 that has divided a copy of the model, however small its parameters."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    return deepspeed.initialize(model=copy.deepcopy(model), config=config)[0]


@torch.no_grad()
def move(trained: Any, reference: Any, *, seed: int) -> None:
    """Change both models alike."""
    change(reference, seed=seed, scale=0.2 if hasattr(reference, "peft_config") else 0.05)
    full = dict(reference.named_parameters())
    for name, value in trained.named_parameters():
        if hasattr(value, "device_mesh"):
            value.copy_(distribute_tensor(full[name].detach(), value.device_mesh, value.placements))
        elif hasattr(value, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([value], modifier_rank=0):
                if dist.get_rank() == 0:
                    value.copy_(full[name.removeprefix("module.")])


async def ask(clients: list[EngineClient]) -> list[list[list[int]]]:
    """Return, for each engine, its greedy completion of each prompt."""
    sampling = SamplingSettings(temperature=0.0, max_tokens=NUM_TOKENS, stop_token_ids=(EOS,))
    requests = [RolloutRequest(prompt_token_ids=prompt, seed=0, sampling=sampling) for prompt in PROMPTS]

    async def on_one(client: EngineClient) -> list[list[int]]:
        answers = await asyncio.gather(*map(client.generate, requests))
        return [answer.token_ids.tolist() for answer in answers]

    return list(await asyncio.gather(*map(on_one, clients)))


if __name__ == "__main__":
    main()
