"""How much more memory a publish takes than there was in use before the engines were connected to."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

import psutil
import torch

_PERIOD_S = 0.005
_MIB = 1 << 20
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,uuid,memory.used", "--format=csv,noheader,nounits")
_NVIDIA_SMI_TIMEOUT_S = 20.0

Probe = Callable[[], int]
"""Returns how many bytes are in use now."""


class MemoryWatch:
    """Samples a probe on a thread; `extra_bytes` is its peak beyond its first value. Use as a context manager.

    Args:
        probe: What is sampled.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="memory")
        self._before = self._peak = 0

    @property
    def extra_bytes(self) -> int:
        """Peak so far beyond what was in use at the start."""
        return self._peak - self._before

    def __enter__(self) -> MemoryWatch:
        self._before = self._peak = self._probe()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, self._probe())

    def _sample(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            self._peak = max(self._peak, self._probe())


class TorchPeak:
    """What torch allocated on this rank's GPU beyond what it held at the start, exactly."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)
        self._before = torch.cuda.memory_allocated(device)

    @property
    def extra_bytes(self) -> int:
        """Peak so far beyond what was allocated at the start."""
        return torch.cuda.max_memory_allocated(self._device) - self._before


def outside_torch(device: torch.device) -> Probe:
    """Return a probe of a GPU's memory that is not in this process's torch allocator: NCCL, IPC, other processes."""

    def probe() -> int:
        # Another thread may give memory back between the two readings, which must not look like somebody else's.
        before = torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        return total - free - max(before, torch.cuda.memory_reserved(device))

    return probe


def resident(pids: Sequence[int]) -> Probe:
    """Return a probe of the resident memory of processes and of all below them."""

    def probe() -> int:
        total = 0
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                for member in (process, *process.children(recursive=True)):
                    with suppress(psutil.NoSuchProcess):
                        total += member.memory_info().rss
        return total

    return probe


def own_resident() -> Probe:
    """Return a probe of this process's resident memory, without the processes below it."""
    process = psutil.Process()
    return lambda: int(process.memory_info().rss)


def used_on_gpus(visible_ids: Sequence[str]) -> Probe:
    """Return a probe of the memory used on GPUs, by index or UUID, without opening them."""

    def probe() -> int:
        done = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True)
        return parse_used_bytes(done.stdout, visible_ids)

    return probe


def parse_used_bytes(output: str, visible_ids: Sequence[str]) -> int:
    """Add up the used memory of some GPUs, from the lines `index, uuid, MiB` of nvidia-smi."""
    total = 0
    for line in output.splitlines():
        index, uuid, used = (field.strip() for field in line.split(","))
        if any(wanted == index or (wanted.startswith("GPU-") and uuid.startswith(wanted)) for wanted in visible_ids):
            total += int(used) * _MIB
    return total
