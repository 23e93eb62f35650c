"""Whether an engine that others have started can serve this trainer; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.engines.probe import ServerFacts
from shoal.errors import ConfigError

# What decides the shapes of a model's weights, in the names that transformers' configurations use.
_SHAPES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "num_experts", "num_local_experts", "moe_intermediate_size", "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a trainer needs of an engine.

    Attributes:
        max_model_len: Its longest prompt with a whole completion, in tokens.
        device: What the trainer's weights lie on: `"cuda"` or `"cpu"`.
        model: The policy's configuration as transformers has it.
    """

    max_model_len: int
    device: str
    model: Mapping[str, Any]


def check_server(facts: ServerFacts, needs: Needs) -> None:
    """Refuse a server that cannot serve this trainer.

    Raises:
        ConfigError: Saying why, and how to start it instead.
    """
    where = f"The engine at {facts.url}"
    if facts.max_model_len < needs.max_model_len:
        raise ConfigError(
            f"{where} takes {facts.max_model_len} tokens, but the longest prompt with max_completion_length needs "
            f"{needs.max_model_len}. Start it with --max-model-len {needs.max_model_len}, or lower "
            "max_completion_length."
        )
    others = {
        name: (facts.model.get(name), needs.model[name])
        for name in _SHAPES
        if facts.model is not None and needs.model.get(name) is not None and facts.model.get(name) != needs.model[name]
    }
    if others:
        theirs = ", ".join(f"{name}={there!r} instead of {here!r}" for name, (there, here) in others.items())
        raise ConfigError(f"{where} serves another model than the one that is trained: {theirs}. Start it with yours.")
    if facts.device != needs.device:
        raise ConfigError(
            f"{where} runs on {facts.device} and the trainer on {needs.device}: weights go from GPUs to GPUs or from "
            "CPUs to CPUs only. Start both on the same kind of device."
        )
    if not facts.has_plugin:
        _check_native_update(facts)
    if facts.data_parallel_size > 1:
        raise ConfigError(
            f"{where} has data_parallel_size={facts.data_parallel_size}, under which a pause takes effect only now and "
            "then. Start as many engines with one each, and give the URL of each."
        )
    if facts.serves_adapters:
        raise ConfigError(f"{where} was started for LoRA adapters; Shoal sends merged weights to attached engines.")
    if facts.logprobs_mode != "processed_logprobs" or facts.generation_config != "vllm":
        raise ConfigError(
            f"{where} was started with --logprobs-mode {facts.logprobs_mode} --generation-config "
            f"{facts.generation_config}, so its logprobs would not be those of what it samples from. Start it with "
            "--logprobs-mode processed_logprobs --generation-config vllm, or with `shoal serve`."
        )


def _check_native_update(facts: ServerFacts) -> None:
    """Refuse a server without Shoal's plugin that vLLM's own weight update cannot reach."""
    if facts.device == "cpu":
        raise ConfigError(
            f"The vLLM server at {facts.url} was started without Shoal's plugin and runs on CPUs: vLLM's own weight "
            "update, the only way then, works between GPUs only. Start it with `shoal serve`."
        )
    if facts.weight_transfer != "nccl":
        raise ConfigError(
            f"The vLLM server at {facts.url} was started without Shoal's plugin, and its weight_transfer_config is "
            f"{facts.weight_transfer!r}. Start it with `shoal serve`, or with "
            '--weight-transfer-config \'{"backend": "nccl"}\' for vLLM\'s own update.'
        )
