"""The contract of a transport on real GPUs: NCCL between two, CUDA IPC on one and between two.

Run on a machine with NVIDIA GPUs: `pytest tests/gpu/test_transport_on_gpus.py`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

NUM_GPUS = torch.cuda.device_count()
FIRST, SECOND = "cuda:0", "cuda:1"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS == 0, reason="no NVIDIA GPU on this machine")]
two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs, found {NUM_GPUS}")


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


contract = _load(Path(__file__).parents[1] / "wire" / "transport_contract.py")
failures = pytest.mark.parametrize("case", contract.FAILURES, ids=lambda case: case.__name__)


def test_ipc_among_four_processes_on_one_gpu() -> None:
    contract.run(contract.TRANSFERS, "ipc", trainers=[FIRST] * 2, workers=[FIRST] * 2)


@failures
def test_ipc_on_one_gpu_when_one_of_two_fails(case: Callable[..., None]) -> None:
    contract.run([case], "ipc", trainers=[FIRST], workers=[FIRST])


@two_gpus
def test_ipc_from_one_gpu_to_another_that_counts_them_the_other_way_round() -> None:
    swapped = {"CUDA_VISIBLE_DEVICES": "1,0"}
    contract.run(contract.TRANSFERS, "ipc", trainers=[FIRST] * 2, workers=[FIRST, SECOND], worker_environment=swapped)


@two_gpus
def test_ipc_to_a_process_that_does_not_see_the_senders_gpu_names_both() -> None:
    with pytest.raises(AssertionError, match="does not see that GPU") as caught:
        contract.run(
            contract.TRANSFERS[:1],
            "ipc",
            trainers=[FIRST],
            workers=[FIRST],
            worker_environment={"CUDA_VISIBLE_DEVICES": "1"},
            timeout_s=15,
        )
    for index in range(2):
        assert str(torch.cuda.get_device_properties(index).uuid) in str(caught.value)


@two_gpus
def test_nccl_between_two_gpus() -> None:
    cases = [case for case in contract.TRANSFERS if case not in contract.NOT_PROMISED_BY_NCCL]
    contract.run(cases, "nccl", trainers=[FIRST], workers=[SECOND])


@pytest.mark.skipif(NUM_GPUS < 4, reason=f"needs 4 GPUs, found {NUM_GPUS}")
def test_nccl_from_two_trainer_ranks_to_two_workers() -> None:
    cases = [case for case in contract.TRANSFERS if case not in contract.NOT_PROMISED_BY_NCCL]
    contract.run(cases, "nccl", trainers=[FIRST, SECOND], workers=["cuda:2", "cuda:3"])


@two_gpus
@pytest.mark.parametrize(
    "case",
    [case for case in contract.FAILURES if case not in contract.NOT_PROMISED_BY_NCCL],
    ids=lambda case: case.__name__,
)
def test_nccl_when_one_of_two_fails(case: Callable[..., None]) -> None:
    contract.run([case], "nccl", trainers=[FIRST], workers=[SECOND], timeout_s=contract.SOON_S / 2)
