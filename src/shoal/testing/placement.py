"""Placements on hosts that are not at hand."""

from __future__ import annotations

from dataclasses import replace

from shoal.placement.devices import hypothetical_gpus
from shoal.placement.plan import place
from shoal.placement.records import PlacementPlan, PlacementRequest

_REQUEST = PlacementRequest(
    num_trainer_processes=1,
    vllm_devices="auto",
    tensor_parallel_size=1,
    pipeline_parallel_size=1,
    num_engines=None,
    num_attention_heads=None,
    num_key_value_heads=None,
    num_hidden_layers=None,
    cpu_cores=(0, 1),
)


def plan_on(num_gpus: int, vllm_devices: str = "auto", **changes: object) -> PlacementPlan:
    """Return the placement on a host with so many GPUs, which is never touched, and two CPU cores.

    Args:
        num_gpus: Of the host.
        vllm_devices: As the setting of that name.
        changes: Of the rest: one trainer process, engines of one worker, a model that nothing is known of.

    Raises:
        PlacementError: It cannot be done.
    """
    return place(hypothetical_gpus(range(num_gpus)), replace(_REQUEST, vllm_devices=vllm_devices, **changes))  # type: ignore[arg-type]
