"""A model divided among two GPUs trains the curve that one GPU trains: DDP, FSDP2 and, where it is installed, ZeRO-3.

Run on a machine with two NVIDIA GPUs: `pytest tests/gpu`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.bench.step import FSDP2_ENVIRONMENT

NUM_GPUS = torch.cuda.device_count()
SCRIPT = Path(__file__).parents[1] / "trainer" / "one_step.py"
TIMEOUT_S = 300.0
STEPS: dict[str, Any] = {
    "max_steps": 20,
    "optim": "adamw_torch",
    "learning_rate": 3e-3,
    "max_grad_norm": 1.0,
    "beta": 0.1,
    "vllm_importance_sampling_clip_max": 3.0,
    "max_tokens_per_micro_batch": 80,
    "gradient_accumulation_steps": 3,
    "regional_compilation": False,
    # The rollouts come from `one_step.py`: nothing is to be started on these GPUs.
    "vllm_server_base_urls": ["http://127.0.0.1:9"],
}
WRAPPED = {"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
ZERO3 = {
    "zero_optimization": {"stage": 3},
    "zero_force_ds_cpu_optimizer": False,
    **dict.fromkeys(
        ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping"),
        "auto",
    ),
}

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS == 0, reason="no NVIDIA GPU on this machine")]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install 'shoal[deepspeed]')"
)


def losses(folder: Path, *, processes: int, environment: dict[str, str] | None = None, **settings: Any) -> torch.Tensor:
    """Train in a group of processes, one a GPU, and return the loss of each step."""
    folder.mkdir()
    case = {"name": "run", "settings": STEPS | settings, "dtype": "float32", "device": "cuda"}
    (folder / "cases.json").write_text(json.dumps([case]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    ended = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), str(folder / "cases.json"), str(folder)],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(processes))),
            "HF_HUB_OFFLINE": "1",
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = torch.load(folder / "run.0.pt", map_location="cpu")
    assert "error" not in found, found
    return torch.tensor([line["loss"] for line in found["logs"] if "loss" in line], dtype=torch.float64)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return losses(tmp_path_factory.mktemp("curves") / "alone", processes=1)


def test_one_gpu_learns_and_another_learning_rate_shows(alone: torch.Tensor, tmp_path: Path) -> None:
    assert len(alone) == 20 and alone.max() - alone.min() > 0.1
    other = losses(tmp_path / "other", processes=1, learning_rate=STEPS["learning_rate"] * 1.1)
    assert (other - alone).abs().max() > 3e-3


@pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs, found {NUM_GPUS}")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero-3", marks=needs_deepspeed)])
def test_two_gpus_train_the_curve_of_one(alone: torch.Tensor, tmp_path: Path, kind: str) -> None:
    environment = FSDP2_ENVIRONMENT | WRAPPED if kind == "fsdp2" else None
    settings = {"deepspeed": ZERO3} if kind == "zero-3" else {}
    found = losses(tmp_path / kind, processes=2, environment=environment, **settings)
    assert len(found) == 20
    assert (found - alone).abs().max() < 1e-3
