"""Tiny models of several architectures, with random weights, whose greedy text has no near ties."""

from __future__ import annotations

from typing import Any

import torch
import transformers

# Heads are 32 wide at least, as vLLM's CPU attention asks for. The vocabulary is no multiple of 64: vLLM pads it.
_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "tie_word_embeddings": False}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),  # q, k and v have biases
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    # It multiplies embeddings by 11: tied, random ones repeat the last token whatever the layers hold.
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": False}),
    "mixtral": ("MixtralConfig", _EXPERTS | {"num_local_experts": 4, "sliding_window": None}),
    "qwen3-moe": ("Qwen3MoeConfig", _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 96}),
}

NAMES = tuple(_CONFIGS)


def make_model(name: str, *, seed: int, num_hidden_layers: int = 2) -> Any:
    """Return a model in float32 with random values everywhere; transformers makes norms and biases of 1 and 0."""
    kind, settings = _CONFIGS[name]
    config = getattr(transformers, kind)(**(_SIZES | settings | {"num_hidden_layers": num_hidden_layers}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    change(model, seed=seed, scale=0.1)
    return model.eval()


@torch.no_grad()
def change(model: Any, *, seed: int, scale: float) -> None:
    """Move every trainable parameter by random amounts."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        if value.requires_grad:
            value.add_(scale * torch.randn(value.shape, generator=generator))
