"""Put values into files that others read: plain JSON values, and files that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

JSONValue: TypeAlias = bool | int | float | str | list["JSONValue"] | dict[str, "JSONValue"] | None


def jsonable(value: Any) -> JSONValue:
    """Return the value as JSON has it: NaN and infinities as null, arrays as lists, anything unknown as its text."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    return str(value)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return the value as JSON text, readable by every parser: no NaN, and no characters that UTF-8 cannot hold."""
    return encodable(json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False, indent=indent))


def encodable(text: str, *, encoding: str = "utf-8") -> str:
    """Return the text with every character that the encoding lacks replaced by a question mark."""
    return text.encode(encoding, errors="replace").decode(encoding)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path` and move it there, so that no reader ever sees half of it.

    Raises:
        OSError: The folder cannot be written to, or the disk is full. Nothing is left beside `path` then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
