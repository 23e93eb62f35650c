"""The shapes of the models that are measured; their weights are random, so that nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a Qwen3 model.

    Attributes:
        hidden: Width.
        intermediate: Width within an MLP.
        layers: Decoder blocks.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        vocabulary: Tokens.
        is_tied: Whether the embedding is the output's matrix too.
        max_tokens: Longest prompt with completion that engines are started for.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocabulary: int = 151936
    is_tied: bool = True
    max_tokens: int = 1024


# Source of the sizes: the config.json of Qwen/Qwen3-0.6B, -1.7B and -8B.
SHAPES = {
    "tiny": ModelShape(
        hidden=128, intermediate=192, layers=2, heads=4, kv_heads=2, head_dim=32, vocabulary=300, max_tokens=512
    ),
    "qwen3-0.6b": ModelShape(hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8),
    # The 1.7B with a small vocabulary, for whole steps.
    "qwen3-1.4b": ModelShape(
        hidden=2048, intermediate=6144, layers=28, heads=16, kv_heads=8, vocabulary=49152, max_tokens=2048
    ),
    "qwen3-1.7b": ModelShape(hidden=2048, intermediate=6144, layers=28, heads=16, kv_heads=8),
    "qwen3-8b": ModelShape(hidden=4096, intermediate=12288, layers=36, heads=32, kv_heads=8, is_tied=False),
}


def shape_name(text: str) -> str:
    """Return the name of a shape as `SHAPES` has it: `8b` is `qwen3-8b`."""
    return text if text in SHAPES else f"qwen3-{text}"


def qwen3_config(shape: ModelShape) -> Any:
    """Return the configuration as transformers has it."""
    from transformers import Qwen3Config

    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.is_tied,
        max_position_embeddings=4 * shape.max_tokens,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
