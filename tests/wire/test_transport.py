"""The contract of a transport, over Gloo and over the logic of CUDA IPC with host memory in the place of a GPU's."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.errors import ConfigError
from shoal.wire.rendezvous import host_store
from shoal.wire.transport import make_transport


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


contract = _load(Path(__file__).with_name("transport_contract.py"))
BACKENDS = ("gloo", "ipc over host memory")


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_trainer_ranks_and_two_workers_exchange_weights(backend: str) -> None:
    contract.run(contract.TRANSFERS, backend, trainers=["cpu"] * 2, workers=["cpu"] * 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", contract.FAILURES, ids=lambda case: case.__name__)
def test_when_one_of_two_fails(case: Callable[..., None], backend: str) -> None:
    contract.run([case], backend, trainers=["cpu"], workers=["cpu"])


def test_a_backend_for_other_devices_is_refused() -> None:
    store = host_store(contract.HOST, contract.TIMEOUT_S)
    with pytest.raises(ConfigError, match="Gloo is for CPUs"):
        make_transport(
            store,
            backend="nccl",
            rank=0,
            num_trainers=1,
            num_workers=1,
            host=contract.HOST,
            device=torch.device("cpu"),
            timeout_s=5,
        )
