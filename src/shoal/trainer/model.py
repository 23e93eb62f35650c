"""Load what the user names: the policy, its tokenizer, the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from shoal.config import GRPOConfig
from shoal.errors import ConfigError
from shoal.trainer.attention import VARLEN, choose_attention, find_available, register_varlen, varlen_kernel
from shoal.wire.plan import dtype_name


def load_policy(model: str | nn.Module, args: GRPOConfig) -> nn.Module:
    """Return the model to train; a string is a folder or a hub id.

    A model given as a string is loaded in float32 unless `model_init_kwargs` says otherwise: with `bf16=True` the
    forward pass runs in bfloat16, and the optimizer adds small updates to full-precision weights. On GPUs its attention
    is one that knows variable lengths, if there is any (`choose_attention`), unless `model_init_kwargs` names one.
    """
    if not isinstance(model, str):
        if args.model_init_kwargs:
            raise ConfigError(
                "model_init_kwargs is set, but the model was given as an object and is not loaded again. "
                "Give the model's path, or apply these settings when you load it."
            )
        return _prepared(model, args)
    keywords = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **_init_kwargs(args)}
    if "attn_implementation" not in keywords:
        chosen = _attention(read_config(model, args), str(keywords["dtype"]), args)
        keywords |= {"attn_implementation": chosen} if chosen else {}
    return _prepared(AutoModelForCausalLM.from_pretrained(model, **keywords), args)


def load_tokenizer(model: str | nn.Module, args: GRPOConfig) -> Any:
    """Return the tokenizer that belongs to the model."""
    name = model if isinstance(model, str) else _name_or_path(model)
    revision = _init_kwargs(args).get("revision", "main")
    return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code, revision=revision)


def add_adapter(model: nn.Module, peft_config: Any, args: GRPOConfig) -> nn.Module:
    """Wrap the model in a new PEFT adapter.

    Raises:
        ConfigError: PEFT is not installed.
    """
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ConfigError("peft_config is set, but PEFT is not installed. Run: pip install peft") from error
    wrapped = get_peft_model(model, peft_config)
    if args.gradient_checkpointing and hasattr(wrapped, "enable_input_require_grads"):
        # The frozen embedding's output needs a gradient, or checkpointed blocks find nothing to differentiate.
        wrapped.enable_input_require_grads()
    assert isinstance(wrapped, nn.Module)
    return wrapped


def context_length(config: Any) -> int | None:
    """Return the longest sequence that the model's positions allow, if its configuration says."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def stop_token_ids(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Return every token that ends a completion: the tokenizer's, and those of the model's generation config."""
    found: set[int] = set()
    for value in (
        getattr(tokenizer, "eos_token_id", None),
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
    ):
        found.update(value if isinstance(value, list) else [] if value is None else [int(value)])
    return tuple(sorted(found))


def compute_dtype(model: nn.Module, args: GRPOConfig) -> str:
    """Return the type in which the trainer computes, which the engines then use too."""
    if args.bf16:
        return "bfloat16"
    if args.fp16:
        return "float16"
    return dtype_name(next(model.parameters()).dtype)


def _init_kwargs(args: GRPOConfig) -> dict[str, Any]:
    return dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # text was parsed by the settings' checks


def _attention(config: Any, dtype: str, args: GRPOConfig) -> str | None:
    """Choose the attention of a model that is about to be loaded, and make transformers know it."""
    classes = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    available = find_available()
    name = choose_attention(
        config,
        classes[0] if isinstance(classes, tuple | list) else classes,
        device_type=args.device.type,
        computes_in_16_bits=bool(args.bf16 or args.fp16) or dtype.removeprefix("torch.") in ("bfloat16", "float16"),
        available=available,
    )
    kernel = varlen_kernel() if name == VARLEN else None
    if kernel is not None:
        register_varlen(kernel)
    return name


def _prepared(model: nn.Module, args: GRPOConfig) -> nn.Module:
    if args.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    if isinstance(model, PreTrainedModel):
        model.config.use_cache = False
    return model


def _name_or_path(model: nn.Module) -> str:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ConfigError("The model says not where it came from. Pass its tokenizer as processing_class.")
    return str(name)


def read_config(model: str | nn.Module, args: GRPOConfig) -> Any:
    """Return the model's configuration without loading its weights."""
    if isinstance(model, str):
        revision = _init_kwargs(args).get("revision", "main")
        return AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, revision=revision)
    config = getattr(model, "config", None)
    if config is None:
        raise ConfigError(
            f"{type(model).__name__} has no `config`, so engines cannot be told what to load. "
            "Pass a transformers model, or the path of one."
        )
    return config


def short_name(model: str | nn.Module) -> str:
    """Return the last part of the model's folder or hub id, for the names of what is made of it."""
    name = model if isinstance(model, str) else str(getattr(getattr(model, "config", None), "_name_or_path", "model"))
    return Path(name).name or "model"


def num_parameter_bytes(model: nn.Module) -> int:
    """Return the size of all parameters as they lie; of those that ZeRO-3 has divided, of the whole."""
    return sum(int(getattr(value, "ds_numel", value.numel())) * value.element_size() for value in model.parameters())


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are spread over ranks (FSDP2's DTensors, DeepSpeed ZeRO-3)."""
    return any(hasattr(value, "device_mesh") or hasattr(value, "ds_id") for value in model.parameters())
