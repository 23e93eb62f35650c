"""The model that is published: made on its device, cut as a trainer would cut it, and changed between publishes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal.bench.settings import BenchSettings
from shoal.bench.shapes import SHAPES, qwen3_config
from shoal.protocols import WeightSource
from shoal.testing import tiny_tokenizer
from shoal.types import ParameterMeta
from shoal.weights.sources import AdapterSource, make_source
from shoal.wire.agreement import ADAPTER, MODEL, Cargo
from shoal.wire.plan import dtype_from_name

_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_model(settings: BenchSettings, device: torch.device) -> Any:
    """Return the model on `device`, with random weights that are the same on all ranks."""
    torch.manual_seed(0)
    model = _plain_model(settings, device)
    if settings.source in ("lora-merged", "adapter"):
        return _with_adapter(model, settings.lora_rank)
    if settings.source == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def make_sources(model: nn.Module, settings: BenchSettings) -> dict[Cargo, WeightSource]:
    """Return this rank's part of what is published."""
    dtype = dtype_from_name(settings.dtype)
    if settings.source != "adapter":
        return {MODEL: make_source(model, wire_dtype=dtype)}
    base = make_source(model, wire_dtype=dtype, merges_adapters=False)
    return {MODEL: base, ADAPTER: AdapterSource(model, wire_dtype=dtype)}


def parameters_of(settings: BenchSettings) -> tuple[ParameterMeta, ...]:
    """Return names and shapes of what every publish but the first sends, without making it."""
    model = _plain_model(settings, torch.device("meta"))
    if settings.source == "adapter":
        return AdapterSource(_with_adapter(model, settings.lora_rank)).metadata()
    return make_source(model).metadata()


def write_engine_folder(settings: BenchSettings, folder: Path, *, has_end: bool = True) -> None:
    """Write what an engine reads of the model: its configuration, and a tokenizer for prompts that are token ids.

    Args:
        settings: Which model.
        folder: Is made.
        has_end: Whether there is a token that ends a completion; without one, each is as long as it may be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = qwen3_config(SHAPES[settings.model_shape])
    config.dtype = settings.dtype
    tokenizer = tiny_tokenizer()
    if not has_end:
        config.eos_token_id = tokenizer.eos_token = None
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def change_weights(model: nn.Module, settings: BenchSettings) -> None:
    """Negate every weight that is sent: each one changes, none drifts however often, and it costs one pass over memory.

    Of an adapter one factor is left alone, or the products would stay as they are.
    """
    only = ".lora_B." if settings.source == "adapter" else ""
    for name, value in model.named_parameters():
        local = value.to_local() if hasattr(value, "to_local") else value
        if only in name and ".lora_A." not in name:
            local.neg_()


def _plain_model(settings: BenchSettings, device: torch.device) -> Any:
    from transformers import Qwen3ForCausalLM

    with _default_dtype(dtype_from_name(settings.dtype)), device:
        return Qwen3ForCausalLM(qwen3_config(SHAPES[settings.model_shape])).eval()


def _with_adapter(model: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    adapted: nn.Module = get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=rank, target_modules=_LORA_TARGETS, task_type="CAUSAL_LM"),
        autocast_adapter_dtype=False,
    )
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if ".lora_B." in name:
                value.normal_(std=0.02)  # PEFT's zeros would leave the model as it is
    return adapted


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)
