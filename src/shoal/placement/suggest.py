"""Find small changes that turn a request which was refused into one that is accepted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from shoal.errors import PlacementError
from shoal.placement.devices import Device
from shoal.placement.divide import divide, engine_pool
from shoal.placement.parse import DeviceSpec, format_gpus, parse_devices
from shoal.placement.records import Division, PlacementRequest
from shoal.placement.wording import counted

_MOST = 3
_PER_SETTING = 2
_MOST_CPU_WORKERS = 64
_SETTINGS = {
    "vllm_devices": "vllm_devices",
    "tensor_parallel_size": "vllm_tensor_parallel_size",
    "pipeline_parallel_size": "vllm_pipeline_parallel_size",
    "num_engines": "vllm_num_engines",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A request that is accepted, and the words for what changed.

    Attributes:
        request: The changed request.
        text: What to do, such as `'set vllm_devices="cuda:6,cuda:7"'`.
    """

    request: PlacementRequest
    text: str


def suggest(devices: Sequence[Device], request: PlacementRequest) -> tuple[Suggestion, ...]:
    """Search for requests near this one that `divide` accepts, the smallest changes first.

    Returns:
        One to three suggestions that change a single setting; where there is none, one that changes several. Never
        empty for a model with at least one layer and one head.
    """
    found: list[Suggestion] = []
    for candidates in _single_changes(devices, request):
        accepted = (_suggestion(request, other) for other in candidates if division_or_none(devices, other))
        found.extend(islice(accepted, _PER_SETTING))
    if found:
        return tuple(found[:_MOST])
    last_resorts = (other for other in _several_changes(devices, request) if division_or_none(devices, other))
    return tuple(_suggestion(request, other) for other in islice(last_resorts, 1))


def division_or_none(devices: Sequence[Device], request: PlacementRequest) -> Division | None:
    """Return how the request would be divided, None if it would be refused."""
    try:
        return divide(devices, request)
    except PlacementError:
        return None


def _single_changes(devices: Sequence[Device], request: PlacementRequest) -> Iterator[Iterator[PlacementRequest]]:
    gpus = tuple(device for device in devices if device.kind == "cuda")
    most = len(gpus) or _MOST_CPU_WORKERS
    yield (replace(request, vllm_devices=spec) for spec in (*_device_list(_pool(gpus, request), request), "auto"))
    if request.num_engines is not None:
        fitting = len(gpus) // max(1, request.num_workers)
        yield (replace(request, num_engines=count) for count in (*range(fitting, 0, -1), None))
    yield (replace(request, tensor_parallel_size=size) for size in _nearest(request.tensor_parallel_size, most))
    yield (replace(request, pipeline_parallel_size=size) for size in _nearest(request.pipeline_parallel_size, most))
    counts = (len(gpus) - request.num_workers, len(gpus), 1)
    yield (replace(request, num_trainer_processes=count) for count in counts if count >= 1)
    yield (replace(request, vllm_devices=spec) for spec in _device_list(gpus, request))


def _several_changes(devices: Sequence[Device], request: PlacementRequest) -> Iterator[PlacementRequest]:
    gpus = [device for device in devices if device.kind == "cuda"]
    unsplit = replace(request, tensor_parallel_size=1, pipeline_parallel_size=1)
    yield unsplit
    yield replace(unsplit, num_engines=None)
    auto = replace(unsplit, num_engines=None, vllm_devices="auto")
    yield auto
    yield replace(auto, num_trainer_processes=max(1, min(request.num_trainer_processes, len(gpus) or 1)))


def _device_list(pool: tuple[Device, ...], request: PlacementRequest) -> tuple[str, ...]:
    """Write the last GPUs of the pool as an explicit list, as many as divide; nothing if they are too few."""
    size = max(1, request.num_workers)
    usable = len(pool) // size * size if request.num_engines is None else request.num_engines * size
    if not 0 < usable <= len(pool):
        return ()
    return (format_gpus(tuple(gpu.index for gpu in pool[len(pool) - usable :])),)


def _pool(gpus: tuple[Device, ...], request: PlacementRequest) -> tuple[Device, ...]:
    """List the GPUs that engines could have had, as far as they exist."""
    try:
        spec = parse_devices(request.vllm_devices)
    except PlacementError:
        spec = DeviceSpec(kind="auto")
    existing = {gpu.index for gpu in gpus}
    known = replace(spec, indices=tuple(index for index in spec.indices if index in existing))
    trainers = gpus[: max(0, request.num_trainer_processes)]
    return () if spec.kind == "cpu" else engine_pool(gpus, trainers, known, request)


def _nearest(size: int, most: int) -> Iterator[int]:
    """Yield every possible size, those near `size` first, of two that are as near the smaller first."""
    return iter(sorted(range(1, max(1, most) + 1), key=lambda other: (abs(other - size), other)))


def _suggestion(request: PlacementRequest, other: PlacementRequest) -> Suggestion:
    changed = [
        f"set {setting}={_written(getattr(other, name))}"
        for name, setting in _SETTINGS.items()
        if getattr(request, name) != getattr(other, name)
    ]
    if request.num_trainer_processes != other.num_trainer_processes:
        count = counted(other.num_trainer_processes, "trainer process", "trainer processes")
        changed.append(f"launch {count} on this host")
    return Suggestion(request=other, text=" and ".join(changed))


def _written(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
