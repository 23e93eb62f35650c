"""A worker's layers: how weights are loaded into them, and what vLLM makes of those afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

# Quantisation methods that on CUDA use a dense weight exactly as it was loaded (read in 0.26 and 0.32:
# `process_weights_after_loading` acts on CPU and XPU only). Anything not listed goes through vLLM's reload.
_PLAIN_ON_CUDA = frozenset({"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"})


# Backends for unquantised experts that on CUDA use w13 and w2 as loaded (read in the same releases). FlashInfer CUTLASS
# swaps the halves of w13 and FlashInfer TRTLLM shuffles rows, both without a change of shape in some release.
_PLAIN_EXPERTS_ON_CUDA = frozenset({"TRITON", "BATCHED_TRITON"})


def check_nothing_derived(model: nn.Module) -> None:
    """Refuse a model of which vLLM keeps matrices that it has computed from the loaded weights.

    A publish fills parameters. Multi-head latent attention (DeepSeek-V2 and V3) computes two matrices more from
    `kv_b_proj` once a checkpoint is loaded, and those would stay what they were while every digest is right.

    Raises:
        RuntimeError: Naming the first such layer.
    """
    for name, module in model.named_modules():
        if any(kind.__name__ == "MLAAttention" for kind in type(module).__mro__):
            raise RuntimeError(
                f"{name} is multi-head latent attention, of which vLLM keeps matrices computed from kv_b_proj: a "
                "publish would not reach them. Models with MLA cannot be published to yet; choose another model."
            )


def layer_parameters(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Return the layer's own parameters by their local names."""
    return {name: value for name, value in layer._parameters.items() if value is not None}


def keeps_layout(layer: nn.Module) -> bool:
    """Whether the layer computes with its parameters as they were loaded, so that they can be written in place."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.platforms import current_platform

    loaded, _ = get_layerwise_info(layer).restore_metadata
    now = layer_parameters(layer)
    if "bias" not in loaded:
        # vLLM 0.32 leaves a plain bias out of what it recorded: it is never taken from its layer.
        now.pop("bias", None)
    if {name: _layout(value) for name, value in loaded.items()} != {
        name: _layout(value) for name, value in now.items()
    }:
        return False
    method = _loading_method(layer)
    if not isinstance(method, QuantizeMethodBase):
        return True
    return bool(current_platform.is_cuda()) and _is_plain_on_cuda(method)


def _loading_method(layer: nn.Module) -> Any:
    """Return what processed the layer's weights. Where adapters are served, experts have it behind another method."""
    method = getattr(layer, "quant_method", None)
    return getattr(method, "old_quant_method", method)


def _is_plain_on_cuda(method: Any) -> bool:
    """Whether the method computes on CUDA with its layer's dense weights exactly as they were loaded."""
    kind = type(method).__name__
    if kind == "UnquantizedFusedMoEMethod":
        return getattr(method.unquantized_backend, "name", None) in _PLAIN_EXPERTS_ON_CUDA
    return kind in _PLAIN_ON_CUDA


@contextmanager
def loading_layout(model: nn.Module) -> Iterator[None]:
    """Give the model, for a while, the empty (meta) parameters that its loaders expect; then put its own back.

    No data is touched. vLLM recorded these parameters, with their loaders, when it built the model.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta

    opened = []
    try:
        for layer in model.modules():
            info = get_layerwise_info(layer)
            _remember_kernel_tensors(layer, info)
            opened.append((layer, info))
            restore_layer_on_meta(layer, info)
        yield
    finally:
        for layer, info in opened:
            _put_back(layer, info)


def open_for_loading(layer: nn.Module) -> None:
    """Give one layer fresh, uninitialised parameters in the layout of the checkpoint."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_layer, restore_layer_on_meta

    info = get_layerwise_info(layer)
    _remember_kernel_tensors(layer, info)
    restore_layer_on_meta(layer, info)
    materialize_layer(layer, info)


def process_and_close(layer: nn.Module) -> None:
    """Let vLLM turn the loaded parameters into what its kernels use, in the storage that they had before."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    info = get_layerwise_info(layer)
    # A flag of the online quantisation methods, which otherwise process only once.
    if hasattr(layer, "_already_called_process_weights_after_loading"):
        delattr(layer, "_already_called_process_weights_after_loading")
    process_again(layer)
    if hasattr(layer, "update_param_tp_status"):
        layer.update_param_tp_status()  # type: ignore[operator]
    # vLLM's own reload copies buffers too, which here hold nothing: only parameters were loaded.
    for name, kernel in info.kernel_tensors[0].items():
        kernel.data.copy_(getattr(layer, name))
    _put_back(layer, info)


def abandon(layer: nn.Module) -> None:
    """Undo `open_for_loading`: give the layer its former parameters back."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    _put_back(layer, get_layerwise_info(layer))


def process_again(layer: nn.Module) -> None:
    """Repack the layer's weight for its kernels, where its method does such a thing."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.platforms import current_platform

    method = _loading_method(layer)
    if not isinstance(method, QuantizeMethodBase):
        return
    with _as_if_first(method) if current_platform.is_cpu() else nullcontext():
        method.process_weights_after_loading(layer)


@contextmanager
def _as_if_first(method: Any) -> Iterator[None]:
    """Let the method of an experts layer forget for a while that it has a kernel.

    On CPUs vLLM 0.32 packs the experts only in the call that makes the kernel; a later one, vLLM's own reload included,
    leaves them as loaded, which the kernel would read as packed.
    """
    kept = {name: getattr(method, name) for name in ("moe_kernel", "moe_quant_config") if hasattr(method, name)}
    if "moe_kernel" in kept:
        method.moe_kernel = None
    try:
        yield
    finally:
        # The first kernel knows the layer's own parameters, whose storage keeps its place.
        for name, value in kept.items():
            setattr(method, name, value)


def load_weights(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Run the model's own loader."""
    loader: Any = model
    loader.load_weights(weights)


def _remember_kernel_tensors(layer: nn.Module, info: Any) -> None:
    from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers

    info.kernel_tensors = get_layer_params_buffers(layer)
    info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)


def _put_back(layer: nn.Module, info: Any) -> None:
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors

    if info.kernel_tensors is not None:
        _place_kernel_tensors(layer, info)
    info.reset()


def _layout(value: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tuple(value.shape), tuple(value.stride()), value.dtype
