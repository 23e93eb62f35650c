"""What carries weights to which engine, and which GPUs that engine sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal import GRPOConfig
from shoal.errors import ConfigError
from shoal.testing.placement import plan_on
from shoal.trainer.carrier import backend_for, opened_devices


def config(tmp_path: Path, backend: str = "auto", **settings: Any) -> GRPOConfig:
    return GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, weight_sync_backend=backend, **settings)


@pytest.mark.parametrize(
    ("gpus", "devices", "ranks", "tp", "reaches", "backends", "opened"),
    [
        (3, "auto", 1, 1, True, ["ipc", "ipc"], [("0",), ("0",)]),
        (3, "auto", 1, 1, False, ["nccl", "nccl"], [(), ()]),
        (4, "auto", 2, 2, True, ["ipc"], [("0", "1")]),
        (2, "colocate", 2, 1, False, ["ipc", "ipc"], [("1",), ("0",)]),
        (2, "colocate", 2, 2, False, ["ipc"], [()]),
        (2, "cpu", 1, 1, True, ["gloo"] * 2, [()] * 2),
    ],
)
def test_an_engine_that_reaches_the_trainers_memory_opens_it_and_sees_their_gpus(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    devices: str,
    ranks: int,
    tp: int,
    reaches: bool,
    backends: list[str],
    opened: list[tuple[str, ...]],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda own, other: reaches)
    plan, args = plan_on(gpus, devices, num_trainer_processes=ranks, tensor_parallel_size=tp), config(tmp_path)
    chosen = [backend_for(engine, plan.trainers, args) for engine in plan.engines]
    assert chosen == backends
    seen = [
        opened_devices(engine, plan.trainers, backend) for engine, backend in zip(plan.engines, chosen, strict=True)
    ]
    assert seen == opened


def test_one_pair_out_of_reach_is_enough_for_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda own, other: (own, other) != (3, 1))
    plan = plan_on(4, "auto", num_trainer_processes=2)
    assert [backend_for(engine, plan.trainers, config(tmp_path)) for engine in plan.engines] == ["ipc", "nccl"]


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_memory_that_nobody_else_can_open_goes_over_nccl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda own, other: True)
    apart, shared = plan_on(2, "auto"), plan_on(1, "colocate")
    for setting, backend in (
        ("expandable_segments:False", "ipc"),
        ("max_split_size_mb:64, expandable_segments:True", "nccl"),
    ):
        monkeypatch.setenv(name, setting)
        assert backend_for(apart.engines[0], apart.trainers, config(tmp_path)) == backend
        assert backend_for(shared.engines[0], shared.trainers, config(tmp_path)) == "ipc"


def test_what_is_asked_for_is_used_or_refused(tmp_path: Path) -> None:
    apart, shared, on_cpu = plan_on(2, "auto"), plan_on(1, "colocate"), plan_on(0, "cpu")
    for backend in ("ipc", "nccl"):
        assert backend_for(apart.engines[0], apart.trainers, config(tmp_path, backend)) == backend
        with pytest.raises(ConfigError, match=r"is about GPUs, and engine-0 runs on the CPU"):
            backend_for(on_cpu.engines[0], on_cpu.trainers, config(tmp_path, backend))
    with pytest.raises(ConfigError, match="NCCL refuses two processes on one GPU"):
        backend_for(shared.engines[0], shared.trainers, config(tmp_path, "nccl"))
    with pytest.raises(ConfigError, match="go over NCCL"):
        config(tmp_path, "ipc", vllm_server_base_urls=["http://10.0.0.7:8000"])
