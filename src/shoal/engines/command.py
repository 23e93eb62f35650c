"""The command line and the environment of one `vllm serve`, as pure functions."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shoal import vllm_compat
from shoal.vllm_plugin.gate import KEY_VARIABLE
from shoal.vllm_plugin.scheduler import PATH as SCHEDULER

SERVED_MODEL_NAME = "policy"
SERVED_ADAPTER_NAME = "policy-adapter"
LOOPBACK = "127.0.0.1"

# Set by torchrun and accelerate for the trainer's own ranks; vLLM's workers would take them for theirs.
_LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME",
)  # fmt: skip
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "DEEPSPEED_")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Everything needed to start one engine.

    Attributes:
        name: Such as `"engine-0"`.
        model_dir: Folder with the model's config and tokenizer. Its weights are not read: the trainer sends them.
        port: To listen on, at `host`.
        cuda_devices: Indices or UUIDs for `CUDA_VISIBLE_DEVICES`; empty for a CPU engine.
        opened_devices: GPUs of the trainer that its workers open memory of, in the same terms as `cuda_devices`.
        cpu_cores: Cores to run on; empty for no binding.
        tensor_parallel_size: vLLM's.
        pipeline_parallel_size: vLLM's.
        dtype: Such as `"bfloat16"`.
        max_model_len: Longest prompt with completion, in tokens; None for the model's own.
        gpu_memory_utilization: Share of each device's memory (GPU engines only).
        cpu_kv_cache_gib: Memory for the KV cache of each worker (CPU engines only).
        seed: vLLM's own; every sample brings its own seed as well.
        extra_arguments: Further `vllm serve` options, such as `{"max-num-seqs": 64}`; True for a bare flag.
        lora_adapter: Folder with an adapter of the trainer's shape whose scaling is 1. The engine then serves this
            adapter, and after the first publish the trainer sends it alone. None for a whole model.
        max_lora_rank: The adapter's largest rank.
        sleeps: Whether it can give its devices' memory back for a while (GPU engines only).
        host: Address to listen on.
        executor: What runs the workers of an engine that has several: `"mp"` processes of its host, `"ray"` for
            workers on several hosts.
    """

    name: str
    model_dir: Path
    port: int
    cuda_devices: tuple[str, ...]
    cpu_cores: tuple[int, ...]
    tensor_parallel_size: int
    pipeline_parallel_size: int
    dtype: str
    max_model_len: int | None
    gpu_memory_utilization: float
    cpu_kv_cache_gib: int
    seed: int
    extra_arguments: Mapping[str, object]
    opened_devices: tuple[str, ...] = ()
    lora_adapter: Path | None = None
    max_lora_rank: int = 16
    sleeps: bool = False
    host: str = LOOPBACK
    executor: Literal["mp", "ray"] = "mp"

    @property
    def request_model(self) -> str:
        """What a request has to name as its model."""
        return SERVED_MODEL_NAME if self.lora_adapter is None else SERVED_ADAPTER_NAME

    @property
    def is_on_gpus(self) -> bool:
        """Whether its workers compute on GPUs: those it names, or those that Ray gives to each."""
        return bool(self.cuda_devices) or self.executor == "ray"

    @property
    def num_workers(self) -> int:
        """Number of vLLM worker processes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


def serve_command(spec: EngineSpec) -> list[str]:
    """Return the argument vector that starts the engine."""
    options: dict[str, object] = {
        "host": spec.host,
        "port": spec.port,
        "served-model-name": SERVED_MODEL_NAME,
        "dtype": spec.dtype,
        "seed": spec.seed,
        "tensor-parallel-size": spec.tensor_parallel_size,
        "pipeline-parallel-size": spec.pipeline_parallel_size,
        # The first publish fills the engine, and nothing is served before it is proven.
        "load-format": "dummy",
        "worker-extension-cls": "shoal.vllm_plugin.worker.ShoalWorker",
        "scheduler-cls": SCHEDULER,
        # The last one comes first in the way of a request.
        "middleware": [
            "shoal.vllm_plugin.publish_route.PublishRoute",
            "shoal.vllm_plugin.generate_route.GenerateRoute",
            "shoal.vllm_plugin.attach_routes.AttachRoutes",
            "shoal.vllm_plugin.gate.ApiKeyGate",
        ],
        # Logprobs of the distribution that was sampled from, temperature included.
        "logprobs-mode": "processed_logprobs",
        # Sampling is the trainer's decision; a model's generation_config.json must not change it.
        "generation-config": "vllm",
        "disable-uvicorn-access-log": True,
    }
    if spec.lora_adapter is not None:
        options |= {
            "enable-lora": True,
            "max-loras": 1,
            "max-lora-rank": vllm_compat.round_up_lora_rank(spec.max_lora_rank),
            # Loaded when the server starts.
            "lora-modules": json.dumps({"name": SERVED_ADAPTER_NAME, "path": str(spec.lora_adapter)}),
        }
    if spec.max_model_len is not None:
        options["max-model-len"] = spec.max_model_len
    if spec.is_on_gpus:
        options["gpu-memory-utilization"] = spec.gpu_memory_utilization
        options["enable-sleep-mode"] = spec.sleeps
    else:
        options["enforce-eager"] = True
        # vLLM's CPU workers die when a step takes a part of the prompt of a request with a seed (0.32: "CPU Generator
        # does not use offset").
        options["no-enable-chunked-prefill"] = True
    if spec.num_workers > 1:
        # The default would be Ray where Ray runs, for engines within one host too.
        options["distributed-executor-backend"] = spec.executor
    options.update(spec.extra_arguments)
    return [sys.executable, *vllm_compat.serve_arguments(str(spec.model_dir)), *_flags(options)]


def serve_environment(spec: EngineSpec, api_key: str, base: Mapping[str, str]) -> dict[str, str]:
    """Return the engine's environment: `base` without what the trainer's launcher set, plus what vLLM needs.

    Args:
        spec: The engine.
        api_key: The run's key.
        base: The trainer's environment.
    """
    environment = without_launcher_variables(base)
    if spec.executor == "mp":
        # The workers talk to one another within their host, whatever the server listens on.
        environment |= {"VLLM_HOST_IP": LOOPBACK, "GLOO_SOCKET_IFNAME": "lo"}
    else:
        environment["VLLM_HOST_IP"] = spec.host
    environment |= {
        KEY_VARIABLE: api_key,
        "VLLM_SERVER_DEV_MODE": "1",  # the pause and weight-update routes; the gate guards them
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",  # its routes could put another adapter in place of the published one
    }
    if spec.cuda_devices:
        # vLLM takes the first ones; the others are only seen, as CUDA demands of whoever opens their memory.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join((*spec.cuda_devices, *spec.opened_devices))
    elif spec.is_on_gpus:
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # Ray's, of an actor without any
    else:
        threads = max(1, len(spec.cpu_cores) // spec.num_workers) if spec.cpu_cores else 1
        environment |= {
            "CUDA_VISIBLE_DEVICES": "",
            # The guard binds the engine to its cores; vLLM's own binding fails in containers and for TP on one node.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_KVCACHE_SPACE": str(spec.cpu_kv_cache_gib),
        }
    return environment


def without_launcher_variables(base: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what torchrun and accelerate set for the trainer's own ranks."""
    return {
        name: value
        for name, value in base.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }


def _flags(options: Mapping[str, object]) -> Sequence[str]:
    flags: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        for item in value if isinstance(value, list) else [value]:
            if item is True:
                flags.append(flag)
            elif item is not False and item is not None:
                flags += [flag, str(item)]
    return flags
