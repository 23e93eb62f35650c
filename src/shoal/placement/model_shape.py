"""The numbers of a model that decide how it can be split, read from its configuration without loading it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import PlacementError

# The names that architectures of transformers use, the common one first.
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """How often a model can be split; None where its configuration does not say.

    Attributes:
        num_attention_heads: Query heads of a layer.
        num_key_value_heads: Key and value heads of a layer.
        num_hidden_layers: Layers.
    """

    num_attention_heads: int | None
    num_key_value_heads: int | None
    num_hidden_layers: int | None


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Read the shape from a `config.json`'s content, or from a transformers configuration's `to_dict()`.

    A multimodal model's language part (`text_config`) is what vLLM splits over workers, so it goes first.
    """
    nested = config.get("text_config")
    language = nested if isinstance(nested, Mapping) else config
    heads = _first(language, _HEADS)
    key_value_heads = _first(language, _KEY_VALUE_HEADS)
    return ModelShape(
        num_attention_heads=heads,
        num_key_value_heads=heads if key_value_heads is None else key_value_heads,
        num_hidden_layers=_first(language, _LAYERS),
    )


def read_model_config(model: Path) -> Mapping[str, Any]:
    """Read the configuration from a checkpoint's folder, or from a `config.json` itself.

    Raises:
        PlacementError: There is no `config.json`, or it is not a JSON object.
    """
    path = model / "config.json" if model.is_dir() else model
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlacementError(
            f"{str(model)!r} has no config.json, so the model's heads and layers are not known. "
            "Give the folder of a checkpoint, or leave the model out to plan without these checks."
        ) from None
    except (OSError, ValueError) as error:
        raise PlacementError(f"{str(path)!r} cannot be read ({error}). Give the folder of a checkpoint.") from None
    if not isinstance(config, dict):
        raise PlacementError(f"{str(path)!r} holds no JSON object. Give the folder of a checkpoint.")
    return config


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
