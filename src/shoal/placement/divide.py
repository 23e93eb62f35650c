"""Divide the devices of one host among trainer processes and engines, or say why that does not come out."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.errors import PlacementError
from shoal.placement.devices import CPU, Device
from shoal.placement.parse import DeviceSpec, parse_devices
from shoal.placement.records import Division, EnginePlacement, PlacementRequest
from shoal.placement.wording import counted, labels

_MOST_OF_ANYTHING = 1024


def divide(devices: Sequence[Device], request: PlacementRequest) -> Division:
    """Divide the devices, exactly as asked.

    Raises:
        PlacementError: It does not come out. The message says what and why; what to do is for the caller to add.
    """
    _check_counts(request)
    _check_model_splits(request)
    spec = parse_devices(request.vllm_devices)
    gpus = tuple(device for device in devices if device.kind == "cuda")
    trainers = trainer_devices(gpus, request.num_trainer_processes)
    if spec.kind == "cpu" or (not gpus and spec.kind != "cuda"):
        engines = _cpu_engines(request, spec)
    else:
        engines = _gpu_engines(engine_pool(gpus, trainers, spec, request), trainers, request, spec)
    used = {device.label for engine in engines for device in engine.devices} | {device.label for device in trainers}
    idle = tuple(device for device in gpus if device.label not in used)
    return Division(trainers=trainers, engines=engines, idle=idle)


def engine_pool(
    gpus: tuple[Device, ...], trainers: tuple[Device, ...], spec: DeviceSpec, request: PlacementRequest
) -> tuple[Device, ...]:
    """List the GPUs that engines may have under a setting that is not `"cpu"`.

    Raises:
        PlacementError: The setting names a GPU that does not exist.
    """
    if spec.kind == "colocate":
        return trainers
    if spec.kind == "auto":
        return gpus[len(trainers) :] or trainers
    by_index = {gpu.index: gpu for gpu in gpus}
    missing = [f"cuda:{index}" for index in spec.indices if index not in by_index]
    if missing:
        there_are = f"has {counted(len(gpus), 'GPU')} ({labels(gpus)})" if gpus else "has no GPU that this process sees"
        raise PlacementError(
            f'vllm_devices="{request.vllm_devices}" names {", ".join(missing)}, but this host {there_are}.'
        )
    return tuple(by_index[index] for index in spec.indices)


def _check_counts(request: PlacementRequest) -> None:
    counts = {
        "the number of trainer processes": request.num_trainer_processes,
        "vllm_tensor_parallel_size": request.tensor_parallel_size,
        "vllm_pipeline_parallel_size": request.pipeline_parallel_size,
        "vllm_num_engines": 1 if request.num_engines is None else request.num_engines,
    }
    for name, count in counts.items():
        if count < 1:
            raise PlacementError(f"{name}={count} is too small: there must be at least one.")
        if count > _MOST_OF_ANYTHING:
            raise PlacementError(f"{name}={count} is too large: no host has devices for that many.")


def _check_model_splits(request: PlacementRequest) -> None:
    tp, pp = request.tensor_parallel_size, request.pipeline_parallel_size
    heads, kv_heads, layers = request.num_attention_heads, request.num_key_value_heads, request.num_hidden_layers
    if heads is not None and heads % tp != 0:
        sizes = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        raise PlacementError(
            f"vllm_tensor_parallel_size={tp} cannot split this model: its {heads} attention heads must divide evenly "
            f"over the workers of an engine, which only the sizes {sizes} do."
        )
    # Fewer key/value heads than workers is fine as long as each is copied to the same number of workers.
    if kv_heads is not None and kv_heads % tp != 0 and tp % kv_heads != 0:
        raise PlacementError(
            f"vllm_tensor_parallel_size={tp} cannot split this model: its {kv_heads} key/value heads can neither be "
            f"divided over {tp} workers nor copied evenly to them."
        )
    if layers is not None and pp > layers:
        raise PlacementError(
            f"vllm_pipeline_parallel_size={pp} is more than the {layers} layers of this model: a stage would be empty."
        )


def trainer_devices(gpus: tuple[Device, ...], count: int) -> tuple[Device, ...]:
    """Give each of `count` trainer processes a GPU, or the CPU where there are none.

    Raises:
        PlacementError: There are fewer GPUs than processes.
    """
    if not gpus:
        return (CPU,) * count
    if count > len(gpus):
        raise PlacementError(
            f"{counted(count, 'trainer process', 'trainer processes')} cannot be placed on "
            f"{counted(len(gpus), 'GPU')} ({labels(gpus)}): each needs a GPU of its own."
        )
    return gpus[:count]


def _gpu_engines(
    pool: tuple[Device, ...], trainers: tuple[Device, ...], request: PlacementRequest, spec: DeviceSpec
) -> tuple[EnginePlacement, ...]:
    _check_split(pool, request, spec, shared=set(pool) <= set(trainers))
    size = request.num_workers
    count = len(pool) // size if request.num_engines is None else request.num_engines
    groups = [pool[index * size : (index + 1) * size] for index in range(count)]
    return tuple(
        _engine(index, group, (), request, colocated=not set(group).isdisjoint(trainers))
        for index, group in enumerate(groups)
    )


def _check_split(pool: tuple[Device, ...], request: PlacementRequest, spec: DeviceSpec, *, shared: bool) -> None:
    size, count = request.num_workers, request.num_engines
    whose = {
        "auto": "that engines share with trainer processes" if shared else "left for rollouts",
        "colocate": "that engines share with trainer processes",
    }.get(spec.kind, "in vllm_devices")
    gpus = f"the {counted(len(pool), 'GPU')} {whose} ({labels(pool)})"
    if count is None and len(pool) % size != 0:
        why = "more than there are" if len(pool) < size else f"and {len(pool)} is not a multiple of that"
        raise PlacementError(f"{_size_text(request)} cannot split {gpus}: every engine takes {size}, {why}.")
    if count is not None and count * size > len(pool):
        raise PlacementError(
            f"vllm_num_engines={count} with {_size_text(request)} needs {count * size} GPUs, more than {gpus}."
        )
    if count is not None and spec.kind == "cuda" and count * size != len(pool):
        raise PlacementError(
            f"vllm_num_engines={count} with {_size_text(request)} uses {count * size} of {gpus}: the two settings "
            "contradict each other."
        )


def _cpu_engines(request: PlacementRequest, spec: DeviceSpec) -> tuple[EnginePlacement, ...]:
    asked, cores = request.num_engines, request.cpu_cores
    assert cores, "a request has at least one core"
    if asked is not None and spec.num_engines is not None and asked != spec.num_engines:
        raise PlacementError(
            f'vllm_num_engines={asked} contradicts vllm_devices="{request.vllm_devices}", which asks for '
            f"{spec.num_engines}."
        )
    count = spec.num_engines or asked or min(2, len(cores))
    workers = (CPU,) * request.num_workers
    return tuple(
        _engine(index, workers, _share(cores, index, count), request, colocated=False) for index in range(count)
    )


def _share(cores: tuple[int, ...], index: int, count: int) -> tuple[int, ...]:
    """Cut `cores` into `count` runs that differ by at most one core; with too few cores, several get the same one."""
    if count > len(cores):
        return (cores[index % len(cores)],)
    return cores[index * len(cores) // count : (index + 1) * len(cores) // count]


def _engine(
    index: int, devices: tuple[Device, ...], cores: tuple[int, ...], request: PlacementRequest, *, colocated: bool
) -> EnginePlacement:
    return EnginePlacement(
        name=f"engine-{index}",
        devices=devices,
        cpu_cores=cores,
        tensor_parallel_size=request.tensor_parallel_size,
        pipeline_parallel_size=request.pipeline_parallel_size,
        colocated=colocated,
    )


def _size_text(request: PlacementRequest) -> str:
    tensor = f"vllm_tensor_parallel_size={request.tensor_parallel_size}"
    if request.pipeline_parallel_size == 1:
        return tensor
    return f"{tensor} x vllm_pipeline_parallel_size={request.pipeline_parallel_size}"
