"""GPUs are found through nvidia-smi, and CUDA_VISIBLE_DEVICES is obeyed as CUDA obeys it."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from shoal.errors import PlacementError
from shoal.placement.devices import discover_devices, parse_nvidia_smi, select_visible, usable_cpu_cores

OUTPUT = """\
0, GPU-aa11-0, 143771, NVIDIA H200
1, GPU-ab22-1, 143771, NVIDIA H200
2, GPU-cc33-2, [N/A], NVIDIA GH200, 144 GB
"""
INSTALLED = parse_nvidia_smi(OUTPUT)


def seen(visible: str | None) -> list[tuple[str, str]]:
    return [(device.label, device.visible_id) for device in select_visible(INSTALLED, visible)]


def test_the_driver_s_table_is_read_with_memory_in_bytes() -> None:
    assert [(gpu.index, gpu.uuid, gpu.memory_bytes) for gpu in INSTALLED] == [
        (0, "GPU-aa11-0", 143771 * 1024 * 1024),
        (1, "GPU-ab22-1", 143771 * 1024 * 1024),
        (2, "GPU-cc33-2", None),
    ]
    assert INSTALLED[2].name == "NVIDIA GH200, 144 GB"


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (None, [("cuda:0", "0"), ("cuda:1", "1"), ("cuda:2", "2")]),
        ("", []),
        ("-1", []),
        ("2,0", [("cuda:0", "2"), ("cuda:1", "0")]),
        ("1,-1,0", [("cuda:0", "1")]),
        ("GPU-cc33-2", [("cuda:0", "GPU-cc33-2")]),
        ("GPU-c, GPU-aa", [("cuda:0", "GPU-c"), ("cuda:1", "GPU-aa")]),
        ("MIG-1234", [("cuda:0", "MIG-1234")]),
    ],
)
def test_visible_devices_are_numbered_anew_and_keep_the_name_a_child_needs(
    visible: str | None, devices: list[tuple[str, str]]
) -> None:
    assert seen(visible) == devices


@pytest.mark.parametrize("visible", ["0,9", "GPU-zz", "GPU-a", "gpu0"])
def test_a_visible_device_that_is_not_there_or_not_unique_is_refused(visible: str) -> None:
    with pytest.raises(PlacementError, match="CUDA_VISIBLE_DEVICES"):
        seen(visible)


def answer(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> None:
    def run(*args: object, **kwargs: object) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(subprocess, "run", run)


def test_a_host_without_nvidia_smi_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, FileNotFoundError())
    assert discover_devices({}) == ()


def test_a_host_whose_driver_does_not_answer_has_no_gpus_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer(monkeypatch, subprocess.CompletedProcess([], 9, stdout="NVIDIA-SMI has failed\n", stderr=""))
    assert discover_devices({}) == ()
    assert "NVIDIA-SMI has failed" in caplog.text


def test_a_driver_that_hangs_is_an_error_and_not_a_host_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, subprocess.TimeoutExpired("nvidia-smi", 60))
    with pytest.raises(PlacementError, match="driver hangs"):
        discover_devices({})


def test_found_gpus_respect_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, subprocess.CompletedProcess([], 0, stdout=OUTPUT, stderr=""))
    assert [device.visible_id for device in discover_devices({"CUDA_VISIBLE_DEVICES": "1"})] == ["1"]


def test_this_process_may_use_at_least_one_core_and_each_is_listed_once() -> None:
    cores = usable_cpu_cores()
    assert cores
    assert list(cores) == sorted(set(cores))
