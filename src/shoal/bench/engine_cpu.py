"""Processor time of an engine: of what computes, and of the front end that feeds it and hands on what it writes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import psutil

from shoal import vllm_compat


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCpu:
    """Seconds of processor time since an engine's processes began.

    Attributes:
        front_end: Of the processes that talk to clients.
        core: Of those that schedule and compute.
    """

    front_end: float
    core: float

    def __add__(self, other: EngineCpu) -> EngineCpu:
        return EngineCpu(front_end=self.front_end + other.front_end, core=self.core + other.core)

    def __sub__(self, other: EngineCpu) -> EngineCpu:
        return EngineCpu(front_end=self.front_end - other.front_end, core=self.core - other.core)


def engine_cpu(pid: int) -> EngineCpu:
    """Return what the processes below this one (an engine's guard) have used."""
    front_end = core = 0.0
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            if vllm_compat.computes(" ".join(process.cmdline())):
                core += times.user + times.system
            else:
                front_end += times.user + times.system
    return EngineCpu(front_end=front_end, core=core)
