"""The command line and the environment of an engine, as pure functions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.engines.command import EngineSpec, serve_command, serve_environment
from shoal.vllm_plugin.gate import KEY_VARIABLE
from shoal.vllm_plugin.scheduler import make_scheduler
from shoal.vllm_plugin.worker import ShoalWorker

KEY = "a-secret-of-this-run"
SPEC = EngineSpec(
    name="engine-1",
    model_dir=Path("/models/policy"),
    port=8123,
    cuda_devices=(),
    cpu_cores=(1,),
    tensor_parallel_size=1,
    pipeline_parallel_size=1,
    dtype="float32",
    max_model_len=512,
    gpu_memory_utilization=0.8,
    cpu_kv_cache_gib=2,
    seed=7,
    extra_arguments={},
)
GPU_SPEC = replace(SPEC, cuda_devices=("2", "GPU-5"), cpu_cores=(), tensor_parallel_size=2, dtype="bfloat16")
LAUNCHED = {
    "PATH": "/usr/bin",
    "HF_HOME": "/cache",
    "MY_OMP": "kept",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "0",
    "ROLE_RANK": "0",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "OMP_NUM_THREADS": "32",
    "KMP_AFFINITY": "granularity=fine",
    "TORCHELASTIC_RUN_ID": "x",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "FSDP_VERSION": "2",
    "DEEPSPEED_CONFIG_FILE": "ds.json",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}


def flags(spec: EngineSpec) -> dict[str, str | None]:
    """Return each flag with its value; None for a bare one."""
    command = serve_command(spec)
    found: dict[str, str | None] = {}
    for index, word in enumerate(command):
        if word.startswith("--"):
            following = command[index + 1] if index + 1 < len(command) else "--"
            assert word not in found or word == "--middleware", f"{word} is given twice"
            found[word] = None if following.startswith("--") else following
    return found


def test_the_engine_listens_on_loopback_alone_behind_the_gate() -> None:
    given = flags(SPEC)
    assert given["--host"] == "127.0.0.1"
    assert given["--port"] == "8123"
    assert given["--middleware"] == "shoal.vllm_plugin.gate.ApiKeyGate"  # the last: what comes first in the way


def test_the_key_is_in_the_environment_and_on_no_command_line() -> None:
    assert serve_environment(SPEC, KEY, {})[KEY_VARIABLE] == KEY
    assert not any("key" in word.lower().replace("apikeygate", "") for word in serve_command(SPEC))


def test_the_model_and_what_makes_its_text_reproducible_are_given() -> None:
    given = flags(SPEC)
    assert "/models/policy" in serve_command(SPEC)
    assert given["--dtype"] == "float32"
    assert given["--seed"] == "7"
    assert given["--max-model-len"] == "512"
    assert given["--logprobs-mode"] == "processed_logprobs"
    assert given["--generation-config"] == "vllm"


def test_no_weights_are_read_and_shoals_own_transfer_brings_them() -> None:
    given = flags(SPEC)
    assert given["--load-format"] == "dummy"
    assert given["--worker-extension-cls"] == f"{ShoalWorker.__module__}.{ShoalWorker.__qualname__}"


def test_every_engine_has_shoals_scheduler() -> None:
    assert flags(SPEC)["--scheduler-cls"] == f"{make_scheduler.__module__}.{make_scheduler.__qualname__}"


def test_an_engine_with_an_adapter_reads_its_base_and_is_asked_for_the_adapter() -> None:
    spec = replace(SPEC, lora_adapter=Path("/runs/a b/adapter"), max_lora_rank=12)
    given = flags(spec)
    assert given["--enable-lora"] is None
    assert (given["--max-loras"], given["--max-lora-rank"]) == ("1", "16")  # vLLM takes certain ranks only
    module = json.loads(given["--lora-modules"] or "")
    assert module == {"name": spec.request_model, "path": "/runs/a b/adapter"}
    assert module["name"] != given["--served-model-name"] == SPEC.request_model
    assert not any("lora" in word for word in serve_command(SPEC))


def test_an_adapter_that_vllm_cannot_serve_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 513.*largest is 512"):
        serve_command(replace(SPEC, lora_adapter=Path("/adapter"), max_lora_rank=513))


def test_without_a_longest_length_the_models_own_holds() -> None:
    assert "--max-model-len" not in flags(replace(SPEC, max_model_len=None))


def test_a_cpu_engine_takes_no_share_of_a_gpu_and_a_gpu_engine_does() -> None:
    assert "--gpu-memory-utilization" not in flags(SPEC)
    assert "--enforce-eager" in flags(SPEC)
    assert flags(GPU_SPEC)["--gpu-memory-utilization"] == "0.8"
    assert "--enforce-eager" not in flags(GPU_SPEC)


def test_only_an_engine_that_is_to_sleep_is_told_that_it_may() -> None:
    assert flags(replace(GPU_SPEC, sleeps=True))["--enable-sleep-mode"] is None
    assert "--enable-sleep-mode" not in flags(GPU_SPEC)
    assert "--enable-sleep-mode" not in flags(SPEC)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (4, 2)])
def test_several_workers_are_processes_of_this_host(tp: int, pp: int) -> None:
    spec = replace(SPEC, tensor_parallel_size=tp, pipeline_parallel_size=pp)
    assert spec.num_workers == tp * pp
    given = flags(spec)
    assert (given["--tensor-parallel-size"], given["--pipeline-parallel-size"]) == (str(tp), str(pp))
    assert given["--distributed-executor-backend"] == "mp"
    assert "--distributed-executor-backend" not in flags(SPEC)


def test_extra_arguments_become_flags_and_win_over_the_defaults() -> None:
    extra = {"max_num_seqs": 64, "enable-prefix-caching": True, "async_scheduling": False, "seed": 9, "revision": None}
    given = flags(replace(SPEC, extra_arguments=extra))
    assert given["--max-num-seqs"] == "64"
    assert given["--enable-prefix-caching"] is None
    assert given["--seed"] == "9"
    assert "--async-scheduling" not in given
    assert "--revision" not in given


def test_nothing_of_the_trainers_launcher_reaches_the_engine_and_the_rest_does() -> None:
    environment = serve_environment(GPU_SPEC, KEY, LAUNCHED)
    kept = {name for name in LAUNCHED if name in environment}
    assert kept == {"PATH", "HF_HOME", "MY_OMP", "CUDA_VISIBLE_DEVICES"}
    assert (environment["PATH"], environment["HF_HOME"], environment["MY_OMP"]) == ("/usr/bin", "/cache", "kept")


def test_the_trainers_own_environment_is_left_as_it_is() -> None:
    base = dict(LAUNCHED)
    serve_environment(GPU_SPEC, KEY, base)
    assert base == LAUNCHED


def test_a_gpu_engine_sees_its_own_devices_alone_and_a_cpu_engine_none() -> None:
    assert serve_environment(GPU_SPEC, KEY, LAUNCHED)["CUDA_VISIBLE_DEVICES"] == "2,GPU-5"
    opening = replace(GPU_SPEC, opened_devices=("0", "1"))
    assert serve_environment(opening, KEY, LAUNCHED)["CUDA_VISIBLE_DEVICES"] == "2,GPU-5,0,1"  # its own first
    assert serve_environment(SPEC, KEY, LAUNCHED)["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("cores", "tp", "threads"),
    [((0,), 1, "1"), ((0, 1, 2, 3), 1, "4"), ((0, 1, 2, 3), 2, "2"), ((0,), 2, "1"), ((), 2, "1")],
)
def test_each_worker_of_a_cpu_engine_has_its_share_of_the_cores(cores: tuple[int, ...], tp: int, threads: str) -> None:
    environment = serve_environment(replace(SPEC, cpu_cores=cores, tensor_parallel_size=tp), KEY, LAUNCHED)
    assert environment["OMP_NUM_THREADS"] == threads
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "2"


def test_nothing_is_reported_to_anybody_and_everything_stays_on_loopback() -> None:
    environment = serve_environment(SPEC, KEY, {})
    assert (environment["VLLM_NO_USAGE_STATS"], environment["DO_NOT_TRACK"]) == ("1", "1")
    assert (environment["VLLM_HOST_IP"], environment["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")


def test_an_engine_for_other_hosts_listens_for_them_while_its_workers_keep_to_theirs() -> None:
    spec = replace(GPU_SPEC, host="10.0.0.7")
    assert flags(spec)["--host"] == "10.0.0.7" and flags(GPU_SPEC)["--host"] == "127.0.0.1"
    environment = serve_environment(spec, KEY, LAUNCHED)
    assert (environment["VLLM_HOST_IP"], environment["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")


def test_an_engine_over_several_nodes_lets_ray_choose_its_gpus_and_its_workers_meet_over_the_network() -> None:
    spec = replace(GPU_SPEC, host="10.0.0.7", executor="ray", cuda_devices=(), tensor_parallel_size=16)
    assert flags(spec)["--distributed-executor-backend"] == "ray"
    assert flags(spec)["--gpu-memory-utilization"] == "0.8" and "--enforce-eager" not in flags(spec)
    # A Ray actor without GPUs of its own sees none, which vLLM must not take over.
    environment = serve_environment(spec, KEY, LAUNCHED | {"CUDA_VISIBLE_DEVICES": ""})
    assert environment["VLLM_HOST_IP"] == "10.0.0.7"
    assert not {"GLOO_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"} & environment.keys()
