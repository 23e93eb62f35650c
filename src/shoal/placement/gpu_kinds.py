"""What is known about kinds of GPUs: memory, and the rates that bound a step."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shoal.errors import PlacementError

_MIB = 1 << 20
_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuKind:
    """One kind of GPU.

    Attributes:
        name: Short, such as `"H100"`.
        memory_bytes: As nvidia-smi reports it.
        flops: Dense bfloat16 operations a second, accumulated in float32.
        memory_bytes_per_s: Of its own memory.
        link_bytes_per_s: To another GPU of the host, one way: NVLink where the kind has it, else PCIe.
    """

    name: str
    memory_bytes: int
    flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float


def gpu_kind(name: str, mib: int, teraflops: float, memory_gb_per_s: float, link_gb_per_s: float) -> GpuKind:
    """Make one, from MiB, TFLOP/s and GB/s."""
    return GpuKind(
        name=name,
        memory_bytes=mib * _MIB,
        flops=teraflops * _TERA,
        memory_bytes_per_s=memory_gb_per_s * _GIGA,
        link_bytes_per_s=link_gb_per_s * _GIGA,
    )


# Rates: NVIDIA data sheets, without sparsity; of a link, half of the bidirectional figure. Memory: nvidia-smi's total.
_KINDS: tuple[tuple[str, GpuKind], ...] = (
    (r"GB?200\b|\bB200", gpu_kind("B200", 183_359, 2250, 8000, 900)),
    (r"\bH200", gpu_kind("H200", 143_771, 989, 4800, 450)),
    (r"\bH100.?NVL", gpu_kind("H100-NVL", 95_830, 835, 3900, 300)),
    (r"\bH100.?PCIE", gpu_kind("H100-PCIe", 81_559, 756, 2000, 64)),
    (r"\bH100", gpu_kind("H100", 81_559, 989, 3350, 450)),
    (r"\bA100.*PCIE.*80|\bA100.*80.*PCIE", gpu_kind("A100-80GB-PCIe", 81_920, 312, 1935, 32)),
    (r"\bA100.*80", gpu_kind("A100-80GB", 81_920, 312, 2039, 300)),
    (r"\bA100", gpu_kind("A100-40GB", 40_960, 312, 1555, 300)),
    (r"\bL40S", gpu_kind("L40S", 46_068, 362, 864, 32)),
    (r"\bL4\b", gpu_kind("L4", 23_034, 121, 300, 32)),
    (r"\bA10G?\b", gpu_kind("A10", 23_028, 125, 600, 32)),
    (r"\bRTX.?4090", gpu_kind("RTX-4090", 24_564, 165, 1008, 32)),
)


def find_gpu_kind(name: str) -> GpuKind | None:
    """Return the kind that a product's name, such as `"NVIDIA H100 80GB HBM3"`, or a short name belongs to."""
    return next((kind for pattern, kind in _KINDS if re.search(pattern, name, re.IGNORECASE)), None)


def known_gpu_kind(name: str) -> GpuKind:
    """Return the kind of that name.

    Raises:
        PlacementError: It is not known.
    """
    kind = find_gpu_kind(name)
    if kind is None:
        known = ", ".join(kind.name for _, kind in _KINDS)
        raise PlacementError(
            f"{name!r} is no kind of GPU that is known: {known}. Describe it with --gpu-memory-gib, --gpu-tflops, "
            "--gpu-memory-gbps and --gpu-link-gbps."
        )
    return kind
