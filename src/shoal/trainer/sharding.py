"""What the kind of sharding changes for a trainer: when gradients are exchanged, and what accelerate must not ignore.

Sharding itself is accelerate's: DDP, FSDP2 or DeepSpeed, as its configuration says (docs/sharding.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import DistributedType
from torch import nn

from shoal.errors import ConfigError


def check_sharding(accelerator: Any) -> None:
    """Refuse what accelerate would ignore, and what weights cannot be published from.

    Args:
        accelerator: The trainer's, made.

    Raises:
        ConfigError: FSDP or DeepSpeed is asked for and not used, or with processes that have not met; FSDP is its first
            version; or layers are split over processes.
    """
    for name, kind in (("FSDP", DistributedType.FSDP), ("DeepSpeed", DistributedType.DEEPSPEED)):
        asked = os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() in ("1", "true", "yes")
        if asked and accelerator.distributed_type != kind:
            raise ConfigError(
                f"{name} is asked for, but accelerate would train with {accelerator.distributed_type.value} and ignore "
                "it: it shards over GPUs, and FSDP over at least two processes. Launch it so, or leave "
                f"{name} out of accelerate's configuration."
            )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.num_processes != launched:
        raise ConfigError(
            f"DeepSpeed is asked for in {launched} processes, each of which accelerate takes for one of "
            f"{accelerator.num_processes}: it has them meet on GPUs only. Launch it where each has a GPU, or leave "
            "DeepSpeed out of accelerate's configuration."
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ConfigError(
            "FSDP version 1 keeps parameters in flat buffers, which cannot be published to engines. Set "
            "`fsdp_version: 2` in accelerate's configuration (its default is 1), or version=2 in fsdp_config."
        )
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.tp_enabled:
        raise ConfigError(
            f"parallelism_config with tp_size={parallelism.tp_size} splits layers over trainer processes, which cannot "
            "be published to engines. Set tp_size to 1 and shard with FSDP2 or DeepSpeed ZeRO-3."
        )


def check_precision(accelerator: Any, args: Any) -> None:
    """Refuse to train in another precision than the settings, and with them the engines, know of.

    Args:
        accelerator: The trainer's, made.
        args: The settings.

    Raises:
        ConfigError: They differ.
    """
    precision = accelerator.mixed_precision
    if precision in ("bf16", "fp16") and not getattr(args, precision):
        raise ConfigError(
            f"accelerate's mixed_precision is {precision}, but {precision}=False: training would be in {precision} all "
            f"the same, and engines in another type. Set {precision}=True, or mixed_precision to no."
        )


@contextmanager
def gradient_exchange(accelerator: Any, model: nn.Module, *, ends_step: bool) -> Iterator[None]:
    """Run one micro-batch's forward and backward pass with the ranks' gradients exchanged when they should be.

    transformers thinks in calls of `training_step`, of which one runs any number of micro-batches, so what it has set
    for the call is set anew for each:

    - DDP exchanges once, in the step's last micro-batch, or in each if accelerate's `sync_each_batch` says so.
    - FSDP2 reduces each micro-batch's gradients into shards. Without that every rank would hold the whole gradient
      and, under bf16, add up micro-batches in bf16 (decision 14).
    - DeepSpeed does what its stage needs; it is told which micro-batch ends the step, and steps right after that one.

    Args:
        accelerator: The trainer's.
        model: As prepared by it.
        ends_step: Whether this is the last micro-batch before the optimizer's step.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.gradient_state._set_sync_gradients(ends_step)
        yield
        return
    if accelerator.is_fsdp2:
        model.set_requires_gradient_sync(True)  # type: ignore[operator]
        yield
        return
    if ends_step or accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        yield
        return
    with accelerator.no_sync(model):
        yield


def backward_keywords(accelerator: Any) -> dict[str, Any]:
    """Return what `accelerator.backward` must be told: a step's loss is never to be divided by its accumulation."""
    return {"scale_wrt_gas": False} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}


@contextmanager
def whole_state_dict(accelerator: Any) -> Iterator[None]:
    """Have transformers save an FSDP2 or ZeRO-3 model whole, whatever the configuration says of checkpoints.

    With accelerate's default for FSDP2, `SHARDED_STATE_DICT`, it would save no weights at all, and not say so; without
    `stage3_gather_16bit_weights_on_model_save` it would save ZeRO-3's parts.

    Args:
        accelerator: The trainer's.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    deepspeed = getattr(accelerator, "deepspeed_engine_wrapped", None)
    if plugin is not None:
        kept = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            yield
        finally:
            plugin.set_state_dict_type(kept)
    elif deepspeed is not None:
        zero = deepspeed.engine._config.zero_config  # no public name, and read anew with each save
        gathers = zero.gather_16bit_weights_on_model_save
        zero.gather_16bit_weights_on_model_save = True
        try:
            yield
        finally:
            zero.gather_16bit_weights_on_model_save = gathers
    else:
        yield
