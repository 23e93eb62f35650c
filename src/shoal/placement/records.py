"""What a placement is asked for, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.placement.devices import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRequest:
    """Everything that decides who gets which device of one host.

    Attributes:
        num_trainer_processes: Trainer ranks on this host; rank i uses the i-th GPU.
        vllm_devices: The setting of that name, as written.
        tensor_parallel_size: Workers that split each layer of an engine.
        pipeline_parallel_size: Stages that an engine's layers are split into.
        num_engines: Engines to start, or None for as many as fit.
        num_attention_heads: Of the model; None where it is not known, and then it is not checked.
        num_key_value_heads: The same, for the key and value heads.
        num_hidden_layers: The same, for the layers.
        cpu_cores: Numbers of the cores that CPU engines may use; not empty.
    """

    num_trainer_processes: int
    vllm_devices: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    num_engines: int | None
    num_attention_heads: int | None
    num_key_value_heads: int | None
    num_hidden_layers: int | None
    cpu_cores: tuple[int, ...]

    @property
    def num_workers(self) -> int:
        """Workers of one engine: tensor times pipeline parallel size."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlacement:
    """Where one engine runs.

    Attributes:
        name: `"engine-0"`, `"engine-1"`, ...
        devices: One entry per worker, in worker order. Workers of a CPU engine all name the one CPU.
        cpu_cores: Cores that the workers of a CPU engine are bound to; empty for an engine on GPUs.
        tensor_parallel_size: Workers that split each layer.
        pipeline_parallel_size: Stages that the layers are split into.
        colocated: Whether a trainer process uses one of its GPUs too. Always False for CPU engines, which have
            nothing to hand over: the system's scheduler shares the cores.
    """

    name: str
    devices: tuple[Device, ...]
    cpu_cores: tuple[int, ...]
    tensor_parallel_size: int
    pipeline_parallel_size: int
    colocated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """The devices of one host, divided.

    Attributes:
        trainers: The device of each trainer process, in rank order.
        engines: The engines, in the order of their devices.
        idle: GPUs that neither a trainer process nor an engine uses.
    """

    trainers: tuple[Device, ...]
    engines: tuple[EnginePlacement, ...]
    idle: tuple[Device, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPlan(Division):
    """A division that can be carried out, with what its user should know before it is.

    Attributes:
        warnings: Sentences, each with the settings to change.
    """

    warnings: tuple[str, ...]
