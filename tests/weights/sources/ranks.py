"""Run by `test_sharded.py` on several processes: shard models, and write down what each rank would send.

`python ranks.py fsdp2|zero3 RANK WORLD_SIZE FOLDER`
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig
from transformers.core_model_loading import Transpose, WeightConverter

from shoal.errors import ConfigError
from shoal.weights.sources import AdapterSource, make_source

SIZES = {
    # Neither 4 nor 2 divides these, so that some ranks have fewer rows, and one has none of the odd layer.
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
}


def llama(**overrides: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**(SIZES | {"tie_word_embeddings": False} | overrides)))
    with torch.no_grad():
        for value in model.parameters():
            value.normal_()
    return model


def mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=3, tie_word_embeddings=False)
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager")


def adapted(model: Any, **settings: Any) -> Any:
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj", "embed_tokens"]} | settings
    model = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(0.1 * torch.randn(value.shape) + (1 if "magnitude" in name else 0))
    return model


def transposed() -> Any:
    model = llama()
    model._weight_conversions = [WeightConverter("up_proj.weight", "up_proj.weight", [Transpose(0, 1)])]
    return model


ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: adapted(llama()),
    "lora_bias": lambda: adapted(llama(), lora_bias=True, target_modules=["q_proj"], use_rslora=True),
    "dora": lambda: adapted(llama(), use_dora=True),
    "experts": lambda: adapted(mixtral(), target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "mixtral": mixtral,
    "transposed": transposed,
    **ADAPTERS,
}


def shard(model: Any, mesh: Any) -> Any:
    for layer in model.modules():
        if type(layer).__name__.endswith("DecoderLayer"):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def record(source: Any) -> dict[str, Any]:
    return {
        "metadata": [(meta.name, meta.shape) for meta in source.metadata()],
        "held": {name: (held.start, held.stop) for name, held in source.held().items()},
        "tensors": {name: value.clone() for name, value in source.tensors()},
    }


def fsdp2(world_size: int) -> dict[str, Any]:
    flat = init_device_mesh("cpu", (world_size,))
    hybrid = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    results: dict[str, Any] = {}
    for name, make in MODELS.items():
        for kind, mesh in (("fsdp2", flat), ("hsdp", hybrid)):
            model = make()
            expected = record(make_source(copy.deepcopy(model)))
            results[f"{name}-{kind}"] = record(make_source(shard(model, mesh))) | {"expected": expected}
    model = adapted(llama(), target_modules=["q_proj", "down_proj"])
    expected = record(AdapterSource(copy.deepcopy(model)))
    results["adapter-fsdp2"] = record(AdapterSource(shard(model, flat))) | {"expected": expected}

    model = shard(llama(), flat)
    source = make_source(model)
    with torch.no_grad():
        model(torch.arange(8).view(1, -1))  # leaves the root's parameters gathered
    plain = record(make_source(llama()))
    results["evaluated-fsdp2"] = record(source) | {"expected": plain}

    compiled = llama()
    compiled.model.layers[0] = torch.compile(compiled.model.layers[0])
    results["compiled-fsdp2"] = record(make_source(torch.compile(shard(compiled, flat)))) | {"expected": plain}

    columns = fully_shard(llama(), mesh=flat, shard_placement_fn=lambda p: Shard(1) if p.shape == (24, 24) else None)
    try:
        make_source(columns)
    except ConfigError as error:
        results["refused"] = str(error)
    return results


def zero3(world_size: int) -> dict[str, Any]:
    import deepspeed

    results: dict[str, Any] = {}
    for name in ("llama", "tied", "mixtral", "transposed", "lora", "dora", "experts"):
        for persisted in (0, 200):
            model = MODELS[name]()
            trained = [value for value in model.parameters() if value.requires_grad]
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=torch.optim.SGD(trained, lr=0.1),
                config={
                    "train_micro_batch_size_per_gpu": 1,
                    "zero_allow_untested_optimizer": True,
                    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": persisted},
                },
            )
            source = make_source(engine)
            ids = torch.arange(8).view(1, -1)
            before = record(source)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            result = record(source)
            result["changed"] = any(
                not torch.equal(value, before["tensors"][key]) for key, value in result["tensors"].items()
            )
            reference = MODELS[name]()
            with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
                whole = {key: value.detach().clone() for key, value in engine.module.named_parameters()}
            reference.load_state_dict(whole, strict=False)
            results[f"{name}-{persisted}"] = result | {"expected": record(make_source(reference))}
    return results


def main() -> None:
    kind, rank, world_size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world_size)
    if kind == "zero3":
        import os

        import deepspeed

        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        results = zero3(world_size)
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        results = fsdp2(world_size)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
