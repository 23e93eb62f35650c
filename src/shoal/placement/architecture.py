"""What a model is made of, matrix by matrix, from its configuration alone: parameters, KV cache, operations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.errors import PlacementError

_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One matrix of a block.

    Attributes:
        name: As in transformers, such as `"q_proj"`.
        inputs: Width of what it is multiplied with.
        outputs: Width of what comes out.
        has_bias: Whether it adds one.
    """

    name: str
    inputs: int
    outputs: int
    has_bias: bool = False

    @property
    def num_parameters(self) -> int:
        """Elements of the matrix and of the bias."""
        return self.inputs * self.outputs + (self.outputs if self.has_bias else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder of the families in `FAMILIES`.

    Attributes:
        family: transformers' `model_type`.
        hidden: Width of the residual stream.
        intermediate: Width within the MLP; of one expert where there are experts.
        num_layers: Blocks.
        num_heads: Query heads.
        num_kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        vocabulary: Tokens.
        is_tied: Whether the embedding is the output's matrix too.
        attention: The matrices of a block's attention.
        dense_mlp: Those of an MLP without experts.
        expert: Those of one expert; empty without experts.
        num_experts: Experts of a block that has them.
        experts_per_token: Of these, how many a token goes through.
        num_moe_layers: Blocks that have experts.
        norms_per_block: Normalisations of width `hidden` in a block.
        normalises_heads: Whether queries and keys are normalised, head by head.
    """

    family: str
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool
    attention: tuple[Linear, ...]
    dense_mlp: tuple[Linear, ...]
    expert: tuple[Linear, ...]
    num_experts: int
    experts_per_token: int
    num_moe_layers: int
    norms_per_block: int
    normalises_heads: bool

    @property
    def query_width(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads, which is that of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        """Elements of one matrix between tokens and the residual stream."""
        return self.vocabulary * self.hidden

    @property
    def num_parameters(self) -> int:
        """All of them, a tied embedding once."""
        blocks = self.num_layers - self.num_moe_layers
        total = blocks * self.block_parameters(has_experts=False)
        total += self.num_moe_layers * self.block_parameters(has_experts=True)
        return total + self.embedding_parameters * (1 if self.is_tied else 2) + self.hidden

    @property
    def largest_block_parameters(self) -> int:
        """Parameters of the largest block."""
        return max(self.block_parameters(has_experts=has) for has in {self.num_moe_layers > 0, self.num_dense > 0})

    @property
    def num_dense(self) -> int:
        """Blocks without experts."""
        return self.num_layers - self.num_moe_layers

    @property
    def matmul_parameters(self) -> int:
        """Parameters that a token is multiplied with: no norms, no lookup of the embedding, of experts only its own."""
        attention = self.num_layers * _elements(self.attention)
        dense = self.num_dense * _elements(self.dense_mlp)
        experts = self.experts_per_token * _elements(self.expert) + self.hidden * self.num_experts
        return attention + dense + self.num_moe_layers * experts + self.embedding_parameters

    def block_parameters(self, *, has_experts: bool) -> int:
        """Return the parameters of one block."""
        total = sum(linear.num_parameters for linear in self.attention) + self.norms_per_block * self.hidden
        total += 2 * self.head_dim if self.normalises_heads else 0
        if not has_experts:
            return total + sum(linear.num_parameters for linear in self.dense_mlp)
        experts = self.num_experts * sum(linear.num_parameters for linear in self.expert)
        return total + experts + self.hidden * self.num_experts

    def lora_parameters(self, rank: int, targets: frozenset[str] | None = None) -> int:
        """Return the parameters of a LoRA adapter.

        Args:
            rank: Of every pair of factors.
            targets: Names of matrices; None for all of every block. Experts are adapted one by one.
        """

        def of(linears: tuple[Linear, ...]) -> int:
            return sum(
                rank * (linear.inputs + linear.outputs)
                for linear in linears
                if targets is None or linear.name in targets
            )

        experts = self.num_moe_layers * self.num_experts * of(self.expert)
        return self.num_layers * of(self.attention) + self.num_dense * of(self.dense_mlp) + experts

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Return what one token takes in the KV cache of a whole engine. Sliding windows are not taken into account."""
        return 2 * self.num_layers * self.kv_width * element_bytes

    def training_flops(self, num_tokens: float, mean_square_length: float, *, trains_matrices: bool = True) -> float:
        """Return the operations of forward and backward, recomputation not counted.

        6 for each parameter and token, and for causal attention 6 x width of the queries x length of the sequence for
        each token and block (Chowdhery et al. 2022, PaLM, appendix B, halved as half of the scores are masked).

        Args:
            num_tokens: Of all sequences.
            mean_square_length: Sum of the squared lengths, divided by the sum of the lengths.
            trains_matrices: Not so beside an adapter, see `product_flops`.
        """
        products = self.product_flops(num_tokens, trains_matrices=trains_matrices)
        return products + self.attention_flops(num_tokens, mean_square_length)

    def product_flops(self, num_tokens: float, *, trains_matrices: bool) -> float:
        """Return the part of `training_flops` that is products with matrices.

        A frozen matrix needs no gradient of its own: of 6 operations for a parameter and token, 4 are left.
        """
        return num_tokens * (6 if trains_matrices else 4) * self.matmul_parameters

    def attention_flops(self, num_tokens: float, mean_square_length: float) -> float:
        """Return the part of `training_flops` that is attention's own: scores, and what they weigh."""
        return num_tokens * 6 * self.num_layers * self.query_width * mean_square_length


def architecture_from_config(config: Mapping[str, Any]) -> Architecture:
    """Read a `config.json`'s content. Of a multimodal model, its language part.

    Raises:
        PlacementError: The family is not known, or a number is missing.
    """
    nested = config.get("text_config")
    language = nested if isinstance(nested, Mapping) else config
    family = str(language.get("model_type", ""))
    if family not in FAMILIES:
        raise PlacementError(
            f"model_type={family!r} is not one whose memory can be estimated. Known are: {', '.join(sorted(FAMILIES))}."
        )
    try:
        return _read(family, FAMILIES[family], language)
    except KeyError as error:
        raise PlacementError(
            f"the model's config.json has no {error.args[0]}, so its size is not known. Give a checkpoint's folder."
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How an architecture of transformers differs from Llama's.

    Attributes:
        head_dim: Where the configuration says none; None for hidden / heads.
        is_tied: Where the configuration does not say.
        norms_per_block: Of the residual stream's width.
        normalises_heads: Queries and keys are normalised.
        biased: Matrices with a bias whatever the configuration says.
        may_be_biased: Matrices that have one where `attention_bias` is set.
    """

    head_dim: int | None = None
    is_tied: bool = False
    norms_per_block: int = 2
    normalises_heads: bool = False
    biased: tuple[str, ...] = ()
    may_be_biased: tuple[str, ...] = ()


_ALL_ATTENTION = (*_QUERY_KEY_VALUE, "o_proj")

# Read from the modelling files of transformers 5.19; a test compares every family with a model made on the meta device.
FAMILIES = {
    "llama": Family(may_be_biased=_ALL_ATTENTION),
    "mistral": Family(),
    "qwen2": Family(biased=_QUERY_KEY_VALUE),
    "qwen3": Family(head_dim=128, normalises_heads=True, may_be_biased=_ALL_ATTENTION),
    "gemma": Family(head_dim=256, is_tied=True, may_be_biased=_ALL_ATTENTION),
    "gemma2": Family(head_dim=256, is_tied=True, norms_per_block=4, may_be_biased=_ALL_ATTENTION),
    "gemma3_text": Family(
        head_dim=256, is_tied=True, norms_per_block=4, normalises_heads=True, may_be_biased=_ALL_ATTENTION
    ),
    "mixtral": Family(),
    "qwen3_moe": Family(normalises_heads=True, may_be_biased=_ALL_ATTENTION),
}


def _read(family: str, traits: Family, config: Mapping[str, Any]) -> Architecture:
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or traits.head_dim or hidden // heads)
    layers, intermediate = int(config["num_hidden_layers"]), int(config["intermediate_size"])
    num_experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
    expert_width = int(config.get("moe_intermediate_size") or intermediate)
    biased = set(traits.biased) | (set(traits.may_be_biased) if config.get("attention_bias") else set())
    mlp_bias = family == "llama" and bool(config.get("mlp_bias"))
    sizes = {
        "q_proj": (hidden, heads * head_dim),
        "k_proj": (hidden, kv_heads * head_dim),
        "v_proj": (hidden, kv_heads * head_dim),
        "o_proj": (heads * head_dim, hidden),
    }
    tied = config.get("tie_word_embeddings")
    return Architecture(
        family=family,
        hidden=hidden,
        intermediate=expert_width if num_experts else intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=int(config["vocab_size"]),
        is_tied=traits.is_tied if tied is None else bool(tied),
        attention=tuple(
            Linear(name=name, inputs=inputs, outputs=outputs, has_bias=name in biased)
            for name, (inputs, outputs) in sizes.items()
        ),
        dense_mlp=_gated_mlp(hidden, intermediate, has_bias=mlp_bias),
        expert=_gated_mlp(hidden, expert_width, has_bias=False) if num_experts else (),
        num_experts=num_experts,
        experts_per_token=int(config.get("num_experts_per_tok") or 0) if num_experts else 0,
        num_moe_layers=_num_moe_layers(config, layers) if num_experts else 0,
        norms_per_block=traits.norms_per_block,
        normalises_heads=traits.normalises_heads,
    )


def _gated_mlp(hidden: int, intermediate: int, *, has_bias: bool) -> tuple[Linear, ...]:
    return (
        Linear(name="gate_proj", inputs=hidden, outputs=intermediate, has_bias=has_bias),
        Linear(name="up_proj", inputs=hidden, outputs=intermediate, has_bias=has_bias),
        Linear(name="down_proj", inputs=intermediate, outputs=hidden, has_bias=has_bias),
    )


def _num_moe_layers(config: Mapping[str, Any], layers: int) -> int:
    """Count the blocks with experts, as Qwen3-MoE says it; every block of a Mixtral has some."""
    step, dense = int(config.get("decoder_sparse_step") or 1), set(config.get("mlp_only_layers") or ())
    return sum(1 for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)


def _elements(linears: tuple[Linear, ...]) -> int:
    return sum(math.prod((linear.inputs, linear.outputs)) for linear in linears)
