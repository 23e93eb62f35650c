"""The devices of this host, found without opening any of them.

GPUs come from `nvidia-smi` and not from `torch.cuda`: a CUDA context would take memory on a device that belongs to an
engine, and `shoal plan` must work where torch is not installed for GPUs.
"""

from __future__ import annotations

import csv
import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from shoal.errors import PlacementError

logger = logging.getLogger(__name__)

DeviceKind: TypeAlias = Literal["cuda", "cpu"]

_MIB = 1024 * 1024
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,uuid,memory.total,name", "--format=csv,noheader,nounits")
_NVIDIA_SMI_TIMEOUT_S = 60.0  # Without the persistence daemon, the first query initialises every GPU: seconds each.


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU as this process may use it, or the host's CPU as a whole.

    Attributes:
        kind: `"cuda"` or `"cpu"`.
        index: The number that torch knows a GPU by in this process (`cuda:<index>`); 0 for the CPU.
        memory_bytes: Total memory of the GPU, None where it is not known.
        name: The product's name, such as `"NVIDIA H200"`.
        visible_id: What a child process needs in `CUDA_VISIBLE_DEVICES` to see this GPU; empty for the CPU.
    """

    kind: DeviceKind
    index: int
    memory_bytes: int | None
    name: str
    visible_id: str

    @property
    def label(self) -> str:
        """How the device is written in settings and messages: `"cuda:3"` or `"cpu"`."""
        return f"cuda:{self.index}" if self.kind == "cuda" else "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledGpu:
    """One line of `nvidia-smi`: a GPU of the host, whether or not this process may use it.

    Attributes:
        index: Its number in PCI bus order.
        uuid: Its UUID, `"GPU-..."`.
        memory_bytes: Its total memory, None where the driver does not say.
        name: The product's name.
    """

    index: int
    uuid: str
    memory_bytes: int | None
    name: str


CPU = Device(kind="cpu", index=0, memory_bytes=None, name="CPU", visible_id="")


def discover_devices(environ: Mapping[str, str] = os.environ) -> tuple[Device, ...]:
    """List the GPUs that this process may use, in torch's order; none on a host without.

    Args:
        environ: Where `CUDA_VISIBLE_DEVICES` is looked up.

    Raises:
        PlacementError: `CUDA_VISIBLE_DEVICES` names a GPU that the host does not have.
    """
    return select_visible(parse_nvidia_smi(_query_nvidia_smi()), environ.get("CUDA_VISIBLE_DEVICES"))


def hypothetical_gpus(indices: Sequence[int]) -> tuple[Device, ...]:
    """Make up GPUs with the given numbers, to plan for a machine that is not at hand."""
    return tuple(
        Device(kind="cuda", index=index, memory_bytes=None, name="GPU", visible_id=str(index)) for index in indices
    )


def visible_ids_beside(own: Sequence[Device], others: Sequence[Device]) -> tuple[str, ...]:
    """Return the `visible_id` of each of some other GPUs, once; left out are a process's own."""
    names = {device.visible_id for device in own}
    return tuple(name for name in dict.fromkeys(device.visible_id for device in others) if name not in names)


def usable_cpu_cores() -> tuple[int, ...]:
    """List the CPU cores that the scheduler lets this process run on, in ascending order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))  # macOS, for `shoal plan` on a laptop


def parse_nvidia_smi(output: str) -> tuple[InstalledGpu, ...]:
    """Read what `nvidia-smi --query-gpu=index,uuid,memory.total,name` printed (CSV, no header, MiB)."""
    rows = csv.reader(output.splitlines(), skipinitialspace=True)
    return tuple(
        InstalledGpu(
            index=int(index),
            uuid=uuid,
            memory_bytes=int(memory_mib) * _MIB if memory_mib.isdigit() else None,
            name=", ".join(name),
        )
        for index, uuid, memory_mib, *name in rows
    )


def select_visible(installed: Sequence[InstalledGpu], visible: str | None) -> tuple[Device, ...]:
    """Apply `CUDA_VISIBLE_DEVICES` to the installed GPUs, and number what is left from 0 as torch does.

    Args:
        installed: All GPUs of the host.
        visible: The variable's value: None where it is unset; else numbers, whole or abbreviated UUIDs, or MIG
            UUIDs. As in CUDA, an empty value hides every GPU, and the list ends at `-1`.

    Raises:
        PlacementError: An entry names a GPU that the host does not have.
    """
    if visible is None:
        return tuple(_device(position, gpu, str(gpu.index)) for position, gpu in enumerate(installed))
    devices: list[Device] = []
    for entry in (piece.strip() for piece in visible.split(",")):
        if entry in ("", "-1"):
            break
        devices.append(_resolve(len(devices), entry, installed, visible))
    return tuple(devices)


def _resolve(position: int, entry: str, installed: Sequence[InstalledGpu], visible: str) -> Device:
    if entry.startswith("MIG-"):  # A slice: `nvidia-smi --query-gpu` lists whole GPUs only.
        return Device(kind="cuda", index=position, memory_bytes=None, name="MIG slice", visible_id=entry)
    matches = [gpu for gpu in installed if entry == str(gpu.index) or _abbreviates(entry, gpu.uuid)]
    if len(matches) != 1:
        known = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in installed) or "none"
        raise PlacementError(
            f'CUDA_VISIBLE_DEVICES="{visible}" names {entry!r}, which is not one of the GPUs of this host: {known}. '
            "CUDA would hide that entry and all after it. Correct or unset CUDA_VISIBLE_DEVICES."
        )
    return _device(position, matches[0], entry)


def _abbreviates(entry: str, uuid: str) -> bool:
    return entry.startswith("GPU-") and uuid.startswith(entry)


def _device(position: int, gpu: InstalledGpu, visible_id: str) -> Device:
    return Device(kind="cuda", index=position, memory_bytes=gpu.memory_bytes, name=gpu.name, visible_id=visible_id)


def _query_nvidia_smi() -> str:
    try:
        answer = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False)
    except FileNotFoundError:
        return ""
    except subprocess.TimeoutExpired:
        raise PlacementError(
            f"nvidia-smi gave no answer within {_NVIDIA_SMI_TIMEOUT_S:g} s, so the GPUs of this host are not known: "
            "the driver hangs. Run nvidia-smi by hand; to train on CPUs all the same, set CUDA_VISIBLE_DEVICES=''."
        ) from None
    if answer.returncode != 0:
        said = (answer.stdout.strip() or answer.stderr.strip()).splitlines()
        logger.warning("No GPU is used: nvidia-smi ended with %d (%s).", answer.returncode, said[0] if said else "")
        return ""
    return answer.stdout
