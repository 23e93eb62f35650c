"""Learn where the factors of a LoRA adapter lie in a worker, by replaying how vLLM loads an adapter.

vLLM holds an adapter in buffers beside the layers that it changes ("stacked": one slot for each adapter in use, q, k
and v apart, every rank padded to the engine's largest). Its own loading takes an adapter apart and copies the pieces
there; the recorder sees these copies, as it does for the base model. Writing the same regions in place is a publish.

The worker must have loaded an adapter of the same shape before: that put it into its slot and zeroed the padding around
it. vLLM multiplies B by the adapter's scaling while it loads, which copies cannot express, so B is sent scaled already
and the adapter that the engine loads at start has a scaling of 1 (`lora_alpha` equal to `r`).

These calls undo a write, because they forget the adapter; the next request that names it loads it from its folder.
Shoal makes none of them:

* `/finish_weight_update`, which takes the base weights for replaced (vLLM 0.32 calls `reset_lora_state`, 0.26 does
  not).
* `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, which exist only with `VLLM_ALLOW_RUNTIME_LORA_UPDATING`.
* vLLM's `reload_weights`.

`ServedAdapter.restore` puts a forgotten adapter back into use before a publish, whose values would else be lost too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from shoal import vllm_compat
from shoal.types import ParameterMeta
from shoal.vllm_plugin.recorder import PlanError, Recorder
from shoal.wire.plan import SlicePlan


class ServedAdapter:
    """The one adapter that a worker serves.

    Args:
        model: The worker's model, with the adapter loaded.
        worker: Name for messages.

    Raises:
        PlanError: The worker serves no adapter, or more than one.
    """

    def __init__(self, model: nn.Module, worker: str) -> None:
        active = vllm_compat.active_adapter(model)
        if active is None:
            raise PlanError(
                f"{worker} does not serve exactly one LoRA adapter, so there is no place to write one to. Start the "
                "engine with --enable-lora --max-loras 1 --lora-modules NAME=FOLDER"
            )
        self._model = model
        self.slot, self._adapter = active

    def shapes(self) -> dict[str, list[tuple[int, ...] | None]]:
        """Return the shapes of its factors, layer by layer."""
        return vllm_compat.adapter_shapes(self._adapter)

    def restore(self) -> bool:
        """Put it back into use if vLLM has forgotten it; return whether that was so.

        Its values are then those of its folder, so a publish must follow before the engine serves.
        """
        return vllm_compat.activate_adapter(self._model, self._adapter)


def learn_adapter_plan(model: nn.Module, parameters: Sequence[ParameterMeta], worker: str) -> SlicePlan:
    """Return where each of an adapter's tensors goes in the buffers that `adapter_tensors` names. Touches no data.

    What vLLM fills with zeros is left out: loading the adapter has done that, and nothing writes there again.

    Args:
        model: The worker's (possibly sharded) model, with an adapter of the same shape in use.
        parameters: Every tensor of the adapter, by PEFT's names (`base_model.model.(...).lora_A.weight`), full shapes.
        worker: Name for messages.

    Raises:
        PlanError: The worker serves no adapter or one of another shape, or a copy cannot be expressed as slices.
    """
    served = ServedAdapter(model, worker)
    # In the engine's type: that is how they are sent, and a cast while loading would hide where its parts come from.
    dtype = vllm_compat.adapter_dtype(model)
    sources = {meta.name: torch.empty(meta.shape, dtype=dtype, device="meta") for meta in parameters}
    recorder = Recorder(sources, adapter_tensors(model))
    with recorder:
        adapter = vllm_compat.make_adapter(model, dict(sources), _rank(parameters))
        _check_shapes(vllm_compat.adapter_shapes(adapter), served.shapes(), worker)
        vllm_compat.put_adapter(model, adapter, served.slot)
    # With `--fully-sharded-loras` the last workers may have no row of an adapter below the engine's largest rank.
    slices = tuple(piece for piece in recorder.slices if piece.source_region.num_elements)
    return SlicePlan(worker=worker, slices=slices, fills=(), reloaded=())


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that hold adapters, named `LAYER.ATTRIBUTE:INDEX`.

    Such as `model.layers.0.self_attn.qkv_proj.lora_a_stacked:2`. Each is whole, all slots of it.
    """
    found: dict[str, torch.Tensor] = {}
    for prefix, layer in vllm_compat.adapter_layers(model).items():
        for attribute, value in vars(layer).items():
            pieces = value if isinstance(value, (tuple, list)) else [value]
            for index, piece in enumerate(pieces):
                if isinstance(piece, torch.Tensor) and _is_whole(piece):
                    found[f"{prefix}.{attribute}:{index}"] = piece
    return found


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether it shows all of its storage: some layers keep views of their buffers beside them."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _rank(parameters: Sequence[ParameterMeta]) -> int:
    # A is [rank, in]; of an embedding's it is [rank, vocabulary].
    return max((min(meta.shape) for meta in parameters if meta.shape), default=1)


def _check_shapes(
    given: dict[str, list[tuple[int, ...] | None]], held: dict[str, list[tuple[int, ...] | None]], worker: str
) -> None:
    """Refuse an adapter that would leave parts of the one in use as they are, or write beside it."""
    for name in sorted(given.keys() | held.keys()):
        if given.get(name) != held.get(name):
            raise PlanError(
                f"{worker} serves an adapter whose factors for {name} are {held.get(name, 'none')}, and the trainer's "
                f"are {given.get(name, 'none')}. Start the engine with the trainer's own adapter"
            )
