"""Trainers with the exact engine in this process, and scripts that need processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset

from shoal import GRPOConfig
from shoal.data.micro_batch import build_micro_batch
from shoal.testing import tiny_model, tiny_tokenizer
from shoal.testing.sequences import random_sequences
from shoal.testing.trainer import ReferenceTrainer
from shoal.types import MicroBatch

FOLDER = Path(__file__).parent
SCRIPT_TIMEOUT_S = 150.0
SMALL: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 4,
    "learning_rate": 1e-3,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    # The bar goes to stderr; without it transformers prints every log to stdout.
    "disable_tqdm": False,
}


def low_bytes(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of tokens in the lower half of the vocabulary: dense, and soon learnt."""
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are faster on one thread, and sums come out the same each time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Settings of a small run on the CPU."""
    return {"output_dir": str(tmp_path / "run"), **SMALL}


@pytest.fixture
def make_trainer(settings: dict[str, Any]) -> Iterator[Callable[..., Any]]:
    """Make trainers; what is not given is small, and their engines end with the test."""
    made = []

    def make(
        *,
        kind: Callable[..., Any] = ReferenceTrainer,
        model: Any = None,
        rewards: Any = low_bytes,
        prompts: Any = "abcdefgh",
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        peft_config: Any = None,
        **changes: Any,
    ) -> Any:
        trainer = kind(
            model=tiny_model() if model is None else model,
            reward_funcs=rewards,
            args=GRPOConfig(**settings | changes),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts])
            if train_dataset is None
            else train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer(),
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        made.append(trainer)
        return trainer

    yield make
    for trainer in made:
        trainer.close()


@pytest.fixture
def batch() -> MicroBatch:
    """A packed micro-batch: a prompt of one token, neighbours of equal length, a long prompt and a long completion."""
    sequences = random_sequences()
    return build_micro_batch(sequences, [1.0] * len(sequences))


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Import a script of this folder, for what it can do in this process too."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"trainer_scripts.{name}", FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script of this folder to its end, in one process or in several of one gloo group."""

    def run(
        name: str, *arguments: object, num_processes: int = 1, timeout_s: float = SCRIPT_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
        return subprocess.run(
            [
                sys.executable,
                *(launcher if num_processes > 1 else []),
                str(FOLDER / f"{name}.py"),
                *map(str, arguments),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    return run


@pytest.fixture
def one_process_group() -> Iterator[None]:
    """A default group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # type: ignore[no-untyped-call]
    yield
    dist.destroy_process_group()
