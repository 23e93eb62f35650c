"""The tiny checkpoints of `real_models.py`: which architectures, and the values of each round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

Tensors: TypeAlias = dict[str, torch.Tensor]

ROUNDS = 2
# Heads are 32 wide at least: vLLM's CPU attention asks for it. The vocabulary is no multiple of 64: vLLM pads it.
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
# The experts' inner size is no multiple of 32, to which CPU kernels pad it.
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One tiny checkpoint.

    Attributes:
        config: Class name of its `transformers` config.
        settings: What differs from `SIZES`.
        dtype: Of the engine.
        checkpoint_dtype: Of the files; the engine's where not given.
        is_moe: Whether it has experts.
        as_trained: Whether the tensors come under the names of the `transformers` module instead of the checkpoint's:
            with the experts of a layer in one parameter.
        engine: Further arguments of the engine.
    """

    config: str
    settings: dict[str, Any]
    dtype: str = "float32"
    checkpoint_dtype: str | None = None
    is_moe: bool = False
    as_trained: bool = False
    engine: dict[str, Any] = field(default_factory=dict)


# Those with experts come first: vLLM makes the group for experts only if the model that it starts with has some.
CASES: dict[str, Case] = {
    "mixtral": Case(config="MixtralConfig", settings={"num_local_experts": 4}, is_moe=True),
    "qwen3-moe": Case(
        config="Qwen3MoeConfig",
        settings=EXPERTS,
        is_moe=True,
    ),
    "qwen3-moe-expert-parallel": Case(
        config="Qwen3MoeConfig",
        settings=EXPERTS,
        is_moe=True,
        engine={"enable_expert_parallel": True},
    ),
    "qwen3-moe-as-trained": Case(
        config="Qwen3MoeConfig",
        settings=EXPERTS,
        is_moe=True,
        as_trained=True,
    ),
    "qwen3-moe-bfloat16": Case(
        config="Qwen3MoeConfig",
        settings=EXPERTS,
        dtype="bfloat16",
        is_moe=True,
    ),
    "deepseek-v2": Case(
        config="DeepseekV2Config",
        settings={
            "kv_lora_rank": 512,
            "q_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64,
            "v_head_dim": 32,
            "head_dim": 64,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
        },
        is_moe=True,
    ),
    "llama-tied": Case(config="LlamaConfig", settings={"tie_word_embeddings": True}),
    "llama-untied": Case(config="LlamaConfig", settings={"tie_word_embeddings": False}),
    "llama-biases": Case(config="LlamaConfig", settings={"attention_bias": True, "mlp_bias": True}),
    "llama-bfloat16": Case(config="LlamaConfig", settings={}, dtype="bfloat16"),
    "llama-bfloat16-from-float32": Case(
        config="LlamaConfig",
        settings={"tie_word_embeddings": True},
        dtype="bfloat16",
        checkpoint_dtype="float32",
    ),
    "llama-one-kv-head": Case(config="LlamaConfig", settings={"num_key_value_heads": 1}),
    "qwen2": Case(config="Qwen2Config", settings={"num_attention_heads": 2, "tie_word_embeddings": True}),
    "qwen3": Case(config="Qwen3Config", settings={}),
    "gemma3": Case(config="Gemma3TextConfig", settings={}),
}


def names_of_cases(pp: int) -> Iterator[str]:
    """Yield the cases that a layout goes through."""
    return (name for name, case in CASES.items() if pp == 1 or not case.is_moe)


def make_checkpoint(case: Case, folder: Path, num_layers: int) -> None:
    """Save a tiny model as `transformers` does."""
    import transformers

    dtype = getattr(torch, case.checkpoint_dtype or case.dtype)
    config = getattr(transformers, case.config)(**(SIZES | {"num_hidden_layers": num_layers} | case.settings))
    transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


def write_values(folder: Path, seed: int) -> Tensors:
    """Replace every value of the checkpoint: norms and biases as transformers makes them are all 1 and 0."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(value.shape, generator=generator) * 0.2 + 0.1).to(value.dtype)
        for name, value in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


def next_tensors(case: Case, folder: Path, seed: int) -> Tensors:
    """Change the checkpoint and return what a trainer that holds its values would send."""
    tensors = write_values(folder, seed)
    if not case.as_trained:
        return tensors
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: value.detach() for name, value in model.named_parameters()}
