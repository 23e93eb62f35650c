"""What one run of the weights benchmark measures: the model, and who is on which device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from shoal.bench.shapes import SHAPES
from shoal.engines.command import EngineSpec
from shoal.engines.process import choose_ports
from shoal.errors import ConfigError
from shoal.placement.devices import Device, visible_ids_beside
from shoal.wire.agreement import Verify
from shoal.wire.device_memory import can_open
from shoal.wire.transport import Backend

BackendChoice: TypeAlias = Literal["auto", "ipc", "nccl"]
SourceKind: TypeAlias = Literal["plain", "lora-merged", "adapter", "ddp", "fsdp2"]

_CPU_KV_CACHE_GIB = 1
_LEAST_SEQUENCES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What is measured.

    Attributes:
        model_shape: One of `SHAPES`.
        device: Of trainer and engines.
        engine_devices: GPUs of the engines, by torch's numbers; empty on CPUs.
        tensor_parallel_size: Of each engine.
        num_engines: Engines.
        num_ranks: Trainer ranks, on the first GPUs.
        source: How the trainer holds its weights.
        lora_rank: Where the source has an adapter.
        repeats: Publishes behind each median.
        running_requests: Completions under way during the publishes that are measured under load.
        verify: How publishes are proven.
        backend_on_gpus: What carries weights to engines on GPUs of their own; `settle_devices` decides on `"auto"`.
        gpu_memory_utilization: vLLM's.
        enforce_eager: vLLM's; engines start faster without CUDA graphs.
    """

    model_shape: str
    device: Literal["cpu", "cuda"]
    engine_devices: tuple[int, ...] = ()
    tensor_parallel_size: int = 1
    num_engines: int = 1
    num_ranks: int = 1
    source: SourceKind = "plain"
    lora_rank: int = 16
    repeats: int = 20
    running_requests: int = 256
    verify: Verify = "digest"
    backend_on_gpus: BackendChoice = "auto"
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False

    @property
    def num_workers(self) -> int:
        """Workers of all engines."""
        return self.num_engines * self.tensor_parallel_size

    @property
    def is_colocated(self) -> bool:
        """Whether an engine shares a GPU with the trainer."""
        return any(index < self.num_ranks for index in self.engine_devices)

    @property
    def backend(self) -> Backend:
        """What carries the weights."""
        if self.device == "cpu":
            return "gloo"
        return "ipc" if self.is_colocated or self.backend_on_gpus == "ipc" else "nccl"

    @property
    def layout(self) -> str:
        """Name of the layout, fit for a file's name."""
        name = f"{self.source}-{self.num_ranks}-to-{self.num_engines}xtp{self.tensor_parallel_size}-{self.device}"
        if self.is_colocated:
            return f"{name}-colocated"
        return name if self.device == "cpu" else f"{name}-{self.backend}"

    @property
    def dtype(self) -> str:
        """Type of the weights."""
        return "bfloat16" if self.device == "cuda" else "float32"

    def devices_of_engine(self, engine: int) -> tuple[int, ...]:
        """Return one engine's GPUs."""
        size = self.tensor_parallel_size
        return self.engine_devices[engine * size : (engine + 1) * size]

    def to_json(self) -> str:
        """Serialise; `from_json` is the inverse."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BenchSettings:
        """Parse what `to_json` wrote."""
        data = json.loads(text)
        return cls(**(data | {"engine_devices": tuple(data["engine_devices"])}))


def check_source(settings: BenchSettings) -> None:
    """Refuse a source that does not go with the number of trainer processes.

    Raises:
        ConfigError: It does not.
    """
    if (settings.source in ("ddp", "fsdp2")) != (settings.num_ranks > 1):
        raise ConfigError(
            f"--source {settings.source} does not go with {settings.num_ranks} trainer process(es): ddp and fsdp2 are "
            "for several, started with torchrun, and the others for one."
        )


def settle_devices(settings: BenchSettings, present: Sequence[Device], *, colocate: bool) -> BenchSettings:
    """Return the settings with the engines' GPUs decided and checked.

    Args:
        settings: With `engine_devices` as the user gave them, or empty.
        present: The GPUs that this process may use.
        colocate: Whether engines are to share the trainer's GPUs.

    Raises:
        ConfigError: The GPUs are too few, or are not those that the layout needs.
    """
    if settings.device == "cpu":
        if settings.engine_devices or colocate:
            raise ConfigError("--engine-devices and --colocate are about GPUs. Leave them out with --device cpu.")
        return settings
    if not settings.engine_devices:
        first = 0 if colocate else settings.num_ranks
        settings = replace(settings, engine_devices=tuple(range(first, first + settings.num_workers)))
    chosen = settings.engine_devices
    if len(chosen) != settings.num_workers or len(set(chosen)) != len(chosen):
        raise ConfigError(
            f"--engine-devices {_listed(chosen)} are not {settings.num_workers} GPUs, which {settings.num_engines} "
            f"engine(s) with --tp {settings.tensor_parallel_size} take. List as many, each once."
        )
    if missing := sorted({*chosen, *range(settings.num_ranks)} - {device.index for device in present}):
        raise ConfigError(
            f"GPU {_listed(missing)} is not here: this process sees {len(present)}. The trainer takes the first "
            f"{settings.num_ranks}, the engines {_listed(chosen)}. Use fewer engines, a smaller --tp, or --colocate."
        )
    if settings.is_colocated != colocate:
        have, do = ("shares no GPU", "Leave out --colocate") if colocate else ("shares a GPU", "Add --colocate")
        raise ConfigError(f"with --engine-devices {_listed(chosen)} an engine {have} with the trainer. {do}.")
    if colocate and settings.backend_on_gpus == "nccl":
        raise ConfigError("NCCL refuses two processes on one GPU. Leave out --backend nccl or --colocate.")
    if settings.backend_on_gpus == "auto":
        reaches = can_open(chosen, range(settings.num_ranks))
        settings = replace(settings, backend_on_gpus="ipc" if reaches else "nccl")
    return settings


def engine_specs(
    settings: BenchSettings,
    folder: Path,
    devices: Sequence[Device],
    *,
    extra_arguments: dict[str, object] | None = None,
) -> list[EngineSpec]:
    """Return what to start.

    Args:
        settings: The layout.
        folder: With the `model` and, if engines serve one, the `adapter` that they read.
        devices: The GPUs that this process may use.
        extra_arguments: Further options of `vllm serve`.
    """
    present = {device.index: device for device in devices}
    own = [[present[index] for index in settings.devices_of_engine(engine)] for engine in range(settings.num_engines)]
    trainers = [present[rank] for rank in range(settings.num_ranks)] if settings.backend == "ipc" else []
    sequences = max(_LEAST_SEQUENCES, -(-settings.running_requests // settings.num_engines))
    options: dict[str, object] = {"max-num-seqs": sequences}
    if settings.enforce_eager:
        options["enforce-eager"] = True
    return [
        EngineSpec(
            name=f"engine-{index}",
            model_dir=folder / "model",
            port=port,
            cuda_devices=tuple(device.visible_id for device in own[index]),
            opened_devices=visible_ids_beside(own[index], trainers),
            cpu_cores=(),
            tensor_parallel_size=settings.tensor_parallel_size,
            pipeline_parallel_size=1,
            dtype=settings.dtype,
            max_model_len=SHAPES[settings.model_shape].max_tokens,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            cpu_kv_cache_gib=_CPU_KV_CACHE_GIB,
            seed=0,
            extra_arguments=options | (extra_arguments or {}),
            lora_adapter=folder / "adapter" if settings.source == "adapter" else None,
            max_lora_rank=settings.lora_rank,
        )
        for index, port in enumerate(choose_ports(settings.num_engines, None))
    ]


def _listed(indices: Sequence[int]) -> str:
    return ",".join(map(str, indices))
