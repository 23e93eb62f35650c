"""Learn a worker's slice plan by replaying the model's own loader with tensors that hold no data.

The checkpoint's parameters are given to `load_weights` as meta tensors. Whatever the loader does with them, be it
chunking for tensor parallelism or stacking q, k and v, ends in copies between views; a view of a meta tensor knows its
offset and strides. A dispatch mode sees each copy and writes it down instead of carrying it out. The plan is therefore
the loader's own, exact for every architecture that vLLM can load.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shoal import vllm_compat
from shoal.types import ParameterMeta
from shoal.wire.plan import Fill, Region, Slice, SlicePlan, dtype_from_name, dtype_name
from shoal.wire.recorder import OriginRecorder, storage_key, written

_aten = torch.ops.aten
_FILLS = (_aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default)  # `view[0] = 0` is a `fill_.Tensor`


class PlanError(RuntimeError):
    """The loader does something with a parameter that copies between views cannot express."""


def learn_plan(model: nn.Module, parameters: Sequence[ParameterMeta], worker: str) -> SlicePlan:
    """Return what this worker's loader would do with `parameters`. Touches no data.

    Args:
        model: The worker's (possibly sharded) model, loaded or not.
        parameters: Every parameter of the checkpoint, full shapes.
        worker: Name for messages.

    Raises:
        PlanError: The loader refuses the parameters, a copy cannot be expressed as slices, or a parameter of the
            engine is left without a source.
    """
    sources = {
        meta.name: torch.empty(meta.shape, dtype=dtype_from_name(meta.dtype), device="meta") for meta in parameters
    }
    reloaded = _reloaded_parameters(model)
    aliases = _alias_groups(model)
    with vllm_compat.loading_layout(model):
        targets = dict(_named_tensors(model))
        recorder = Recorder(sources, targets)
        with recorder:
            _replay(model, sources, worker)
        plan = SlicePlan(
            worker=worker, slices=tuple(recorder.slices), fills=tuple(recorder.fills), reloaded=tuple(reloaded)
        )
        _check_coverage(plan, {name: value for name, value in targets.items() if _is_parameter(model, name)}, aliases)
    return plan


def _replay(model: nn.Module, sources: Mapping[str, torch.Tensor], worker: str) -> None:
    try:
        vllm_compat.load_weights(model, list(sources.items()))
    except PlanError:
        raise
    except Exception as error:  # loaders raise what they like: KeyError for a name, AssertionError for a shape
        raise PlanError(
            f"{worker}'s loader does not take the trainer's parameters ({type(error).__name__}: {error}). The trainer "
            "must send them under the names and in the shapes of a checkpoint of this model."
        ) from error


class Recorder(OriginRecorder):  # type: ignore[no-untyped-call]
    """Writes down copies from sources into targets, and carries out nothing that would change a target."""

    def __init__(self, sources: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> None:
        super().__init__(sources)
        self.slices: list[Slice] = []
        self.fills: list[Fill] = []
        self._targets = {storage_key(tensor): name for name, tensor in targets.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.copy_.default and (target := self._targets.get(storage_key(args[0]))) is not None:
            self._record_copy(target, args[0], args[1])
            return args[0]
        if func in _FILLS and (target := self._targets.get(storage_key(args[0]))) is not None:
            value = float(args[1]) if len(args) > 1 else 0.0
            self.fills.append(Fill(target=target, target_region=Region.of(args[0]), value=value))
            return args[0]
        for changed in written(func, args, kwargs or {}):
            if (target := self._targets.get(storage_key(changed))) is not None:
                raise PlanError(
                    f"the loader changes {target} in place with {func} instead of copying into it; such a parameter "
                    "cannot be sent slice by slice"
                )
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _record_copy(self, target: str, into: torch.Tensor, value: torch.Tensor) -> None:
        origin = self.origin(value.expand(into.shape) if value.shape != into.shape else value)
        if origin is None:
            raise PlanError(
                f"the loader computes the value of {target} {tuple(into.shape)} instead of copying it from the "
                "checkpoint; such a parameter cannot be sent slice by slice"
            )
        source, region = origin
        self.slices.append(
            Slice(
                source=source,
                source_region=region,
                target=target,
                target_region=Region.of(into),
                dtype=dtype_name(into.dtype),
            )
        )


def _named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return every parameter and buffer under its full name, tied ones under each of their names."""
    return [
        (f"{prefix}.{name}" if prefix else name, value)
        for prefix, layer in model.named_modules()
        for name, value in [*layer._parameters.items(), *layer._buffers.items()]
        if value is not None
    ]


def _is_parameter(model: nn.Module, name: str) -> bool:
    prefix, _, local = name.rpartition(".")
    return local in model.get_submodule(prefix)._parameters


def _reloaded_parameters(model: nn.Module) -> list[str]:
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in model.named_modules()
        if layer._parameters and not vllm_compat.keeps_layout(layer)
        for name in vllm_compat.layer_parameters(layer)
    ]


def _alias_groups(model: nn.Module) -> dict[str, set[str]]:
    """Return, for each parameter, the names under which the same tensor is known (tied embeddings)."""
    names: dict[int, set[str]] = defaultdict(set)
    for prefix, layer in model.named_modules():
        for name, value in vllm_compat.layer_parameters(layer).items():
            names[id(value)].add(f"{prefix}.{name}" if prefix else name)
    return {name: group for group in names.values() for name in group}


def _check_coverage(plan: SlicePlan, targets: Mapping[str, torch.Tensor], aliases: Mapping[str, set[str]]) -> None:
    written: dict[str, int] = defaultdict(int)
    pieces: list[Slice | Fill] = [*plan.slices, *plan.fills]
    # A set: a region that is written twice leaves as much unwritten as before.
    for target, region in {(piece.target, piece.target_region) for piece in pieces}:
        written[target] += region.num_elements
    for name, value in targets.items():
        known_as = aliases.get(name, {name})
        if not any(written[alias] >= value.numel() for alias in known_as):
            raise PlanError(
                f"{plan.worker} has a parameter {name} {tuple(value.shape)} of which the trainer's checkpoint fills "
                f"{max(written[alias] for alias in known_as)} of {value.numel()} elements: it is another model"
            )
