"""What is checked before anything starts, beyond what the settings alone can tell."""

from __future__ import annotations

import shutil
from pathlib import Path

from shoal.errors import ConfigError

_LOGS_BYTES = 64 << 20  # engine logs, metrics and completions of a short run


def check_disk(output_dir: Path, *, model_bytes: int, saves_optimizer: bool) -> None:
    """Refuse to start a run that could not write its first checkpoint.

    Args:
        output_dir: Need not exist yet.
        model_bytes: Size of the weights.
        saves_optimizer: Whether checkpoints hold Adam's two moments too, each of the weights' size.

    Raises:
        ConfigError: The disk has too little room, or the folder cannot be written to.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output_dir).free
    except OSError as error:
        raise ConfigError(f"output_dir={str(output_dir)!r} cannot be used: {error}") from error
    needed = model_bytes * (3 if saves_optimizer else 1) + _LOGS_BYTES
    if free < needed:
        raise ConfigError(
            f"The disk of output_dir={str(output_dir)!r} has {_gib(free)} GiB free, but the first checkpoint needs "
            f"{_gib(needed)} GiB. Make room, choose another output_dir, or set save_only_model=True."
        )


def check_reward_weights(weights: list[float] | None, num_functions: int) -> list[float]:
    """Return one weight for each reward function.

    Raises:
        ConfigError: Their numbers differ.
    """
    if weights is None:
        return [1.0] * num_functions
    if len(weights) != num_functions:
        raise ConfigError(
            f"reward_weights has {len(weights)} entries for {num_functions} reward functions. Give one for each."
        )
    return list(weights)


def longest_prompt(context: int | None, engine_context: int | None, max_completion_length: int) -> int:
    """Return how many tokens a prompt may have, so that it and a whole completion fit.

    Args:
        context: Of the model; None if unknown.
        engine_context: `vllm_max_model_length`.
        max_completion_length: Of the settings.

    Raises:
        ConfigError: Not even an empty prompt would fit.
    """
    known = [length for length in (context, engine_context) if length is not None]
    if not known:
        return 1 << 30
    room = min(known) - max_completion_length
    if room < 1:
        raise ConfigError(
            f"max_completion_length={max_completion_length} leaves no room for a prompt in a context of {min(known)} "
            "tokens. Lower it, or raise vllm_max_model_length if the model allows."
        )
    return room


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f}"
