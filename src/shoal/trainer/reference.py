"""The reference for the KL term: the policy as it was at the start, held the way the policy is held."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from accelerate.utils import DistributedType
from torch import nn

from shoal.errors import ConfigError


class ReferencePolicy:
    """The base of an adapter, or a frozen copy, sharded like the policy.

    Args:
        policy: The unwrapped policy before its first update.
        reload: Loads the policy anew; None if it was given as an object.

    Raises:
        ConfigError: ZeRO-3 has divided the policy already, and it cannot be loaded again.
    """

    def __init__(self, policy: nn.Module, *, reload: Callable[[], nn.Module] | None = None) -> None:
        self._is_adapter = hasattr(policy, "peft_config")
        self._copy = None if self._is_adapter else _frozen(_second(policy, reload))
        self._is_placed = False
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def shard(self, accelerator: Any) -> None:
        """Divide the copy among the ranks if the policy will be. Collective, and only before the first use.

        Until then each rank that has loaded the model has a second copy in its host memory.

        Args:
            accelerator: The trainer's.
        """
        if self._copy is None:
            return
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._copy = _deepspeed_engine(self._copy, accelerator)
            self._is_placed = True
        elif accelerator.is_fsdp2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            self._copy = fsdp2_prepare_model(accelerator, self._copy)
            self._is_placed = True
        else:
            # accelerate does not wrap the copy, so it would not compute in the policy's precision by itself. The
            # other two do, and would compute a little otherwise than the policy under autocast.
            self._autocast = accelerator.autocast

    def model(self, policy: nn.Module, unwrapped: nn.Module) -> tuple[nn.Module, AbstractContextManager[Any]]:
        """Return the model to call and the context to call it in."""
        if self._copy is None:
            return policy, _without_adapter(unwrapped)
        if not self._is_placed:
            self._copy = self._copy.to(next(unwrapped.parameters()).device)
        return self._copy, self._autocast()


def _second(policy: nn.Module, reload: Callable[[], nn.Module] | None) -> nn.Module:
    """Return the same model again. Parameters that ZeRO-3 divided while loading are lost by copying."""
    if not any(hasattr(value, "ds_id") for value in policy.parameters()):
        return copy.deepcopy(policy)
    if reload is None:
        raise ConfigError(
            "beta > 0 needs the model as it was at the start, but DeepSpeed ZeRO-3 divided the model that was passed "
            "while it was loaded, and such a model cannot be copied. Pass the model's path, or set beta=0.0."
        )
    return reload()


@contextmanager
def _without_adapter(policy: nn.Module) -> Iterator[None]:
    """Disable the adapter, whose parameters stay trainable.

    PEFT freezes them meanwhile. FSDP2 exchanges parameter objects during the forward pass, so that PEFT would thaw
    others than it froze.
    """
    trainable = [value for value in policy.parameters() if value.requires_grad]
    with policy.disable_adapter():  # type: ignore[operator]
        for value in trainable:
            value.requires_grad_(True)
        yield


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def _deepspeed_engine(model: nn.Module, accelerator: Any) -> nn.Module:
    """Return an engine without optimizer: divided under stage 3, else whole, as the policy's weights are."""
    import deepspeed  # type: ignore[import-not-found]

    plugin = accelerator.state.deepspeed_plugin
    zero: dict[str, Any] = {"stage": 3 if plugin.zero_stage == 3 else 0}
    if plugin.zero_stage == 3 and (offload := plugin.deepspeed_config["zero_optimization"].get("offload_param")):
        zero["offload_param"] = offload
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    for precision in ("bf16", "fp16"):
        if plugin.deepspeed_config.get(precision, {}).get("enabled") is True:
            config[precision] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    assert isinstance(engine, nn.Module)
    return engine
