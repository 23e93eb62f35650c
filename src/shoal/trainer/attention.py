"""Attention over packed sequences: which implementation is used, and torch's variable-length kernel as one of them.

transformers hands an attention function whatever it does not know itself, so the boundaries of the packed sequences are
computed once for a micro-batch (`boundaries`) and reach every layer, under the names that flash attention has for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from shoal.errors import ConfigError

VARLEN = "shoal_varlen"
_TAKES_BOUNDARIES = (VARLEN, "flash_attention_2", "flash_attention_3")
_LARGEST_HEAD = 256  # of the flash kernels
_CAUSAL = (-1, 0)


class VarlenKernel(Protocol):
    """What `torch.nn.attention.varlen.varlen_attn` is called as; tensors are `[T, heads, head width]`."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Available:
    """What this machine has.

    Attributes:
        flash_attention_3: The package for Hopper GPUs.
        flash_attention_2: The other flash-attn package.
        varlen: torch's own kernel, see `varlen_kernel`.
    """

    flash_attention_3: bool
    flash_attention_2: bool
    varlen: bool


def find_available() -> Available:
    """Look what can be imported, without asking a hub for kernels."""
    from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

    return Available(
        flash_attention_3=is_flash_attn_3_available(),
        flash_attention_2=is_flash_attn_2_available(),
        varlen=varlen_kernel() is not None,
    )


def choose_attention(
    config: Any, model_class: Any, *, device_type: str, computes_in_16_bits: bool, available: Available
) -> str | None:
    """Return the name of the attention implementation to load a model with; None for transformers' own choice (SDPA).

    Args:
        config: The model's.
        model_class: The class that will be made, or None if unknown.
        device_type: Where it trains.
        computes_in_16_bits: Whether attention gets bfloat16 or float16, all that flash kernels take.
        available: What this machine has.
    """
    if device_type != "cuda" or not computes_in_16_bits or model_class is None:
        return None
    if getattr(model_class, "_supports_flash_attn", False):
        for name in ("flash_attention_3", "flash_attention_2"):
            if getattr(available, name):
                return name
    if available.varlen and getattr(model_class, "_supports_attention_backend", False) and fits_varlen(config):
        return VARLEN
    return None


def fits_varlen(config: Any) -> bool:
    """Whether all layers of a model are what torch's variable-length kernel computes: plain causal attention."""
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        kinds == {"full_attention"}
        and window is None
        and getattr(config, "attn_logit_softcapping", None) is None
        and not getattr(config, "attention_dropout", 0.0)
        and not hasattr(config, "kv_lora_rank")  # MLA's values are narrower than its keys
        and getattr(config, "is_causal", True)
        and head % 8 == 0
        and head <= _LARGEST_HEAD
    )


def takes_boundaries(model: nn.Module) -> bool:
    """Whether the (unwrapped) model's attention can be told where packed sequences begin."""
    config = getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None) in _TAKES_BOUNDARIES


def boundaries(position_ids: torch.Tensor) -> dict[str, Any]:
    """Return where packed sequences begin and the longest one's length, as keywords of a model's forward pass.

    Args:
        position_ids: `[T]`, from 0 in each sequence.
    """
    starts = (position_ids == 0).nonzero().flatten()
    ends = torch.cat([starts, starts.new_tensor([len(position_ids)])]).to(torch.int32)
    longest = int(position_ids.max()) + 1
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def varlen_kernel() -> VarlenKernel | None:
    """Return torch's variable-length attention if this torch has one that can be causal; None if not.

    Its arguments have changed between versions (2.10 has no window, and not all know of grouped heads), so what it
    takes is looked up. Heads are repeated where it does not group them.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= set(names):
        return None
    groups_heads = "enable_gqa" in names

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *places: Any, **keywords: Any
    ) -> torch.Tensor:
        times = query.shape[1] // key.shape[1]
        if times > 1 and groups_heads:
            keywords["enable_gqa"] = True
        elif times > 1:
            key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
        out = varlen_attn(query, key, value, *places, **keywords)
        assert isinstance(out, torch.Tensor), "nothing else was asked for"
        return out

    return kernel


def register_varlen(kernel: VarlenKernel, name: str = VARLEN) -> None:
    """Let transformers find attention by `kernel` under `name`; it makes no mask for it. Again is harmless."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, varlen_attention(kernel))


def varlen_attention(kernel: VarlenKernel) -> Callable[..., tuple[torch.Tensor, None]]:
    """Make an attention function of transformers from a variable-length kernel."""

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        position_ids: torch.Tensor | None = None,
        **keywords: Any,
    ) -> tuple[torch.Tensor, None]:
        _refuse_others(module, query, key, attention_mask, keywords)
        batch, _, length, _ = query.shape
        if cu_seq_lens_q is None or max_length_q is None:
            if position_ids is None:
                position_ids = torch.arange(length, device=query.device)
            found = boundaries(position_ids.expand(batch, length).flatten())
            cu_seq_lens_q, max_length_q = found["cu_seq_lens_q"], found["max_length_q"]
        assert cu_seq_lens_q is not None and max_length_q is not None
        value = _in_autocast(value)
        # Norms and rotary positions may leave float32, which no kernel takes.
        query, key, value = (x.to(value.dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out = kernel(
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=_CAUSAL,
        )
        return out.reshape(batch, length, *out.shape[1:]), None

    return attention


def _refuse_others(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    keywords: dict[str, Any],
) -> None:
    """Raise for anything but causal attention of whole sequences to themselves."""
    others = [
        name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if keywords.get(name) is not None
    ]
    if keywords.get("dropout"):
        others.append("dropout")
    if attention_mask is not None:
        others.append("a mask")
    if query.shape[2] != key.shape[2]:
        others.append("a cache of keys and values")
    if not (keywords["is_causal"] if keywords.get("is_causal") is not None else getattr(module, "is_causal", True)):
        others.append("attention to later tokens")
    if others:
        raise ConfigError(
            f"{type(module).__name__} asks for {', '.join(others)}, which torch's variable-length attention does not "
            'compute. Set model_init_kwargs={"attn_implementation": "sdpa"}.'
        )


def _in_autocast(values: torch.Tensor) -> torch.Tensor:
    """Return float32 values in autocast's type."""
    kind = values.device.type
    if values.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return values.to(torch.get_autocast_dtype(kind))
    return values
