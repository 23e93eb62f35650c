"""Every configuration that docs/sharding.md names is read by accelerate's launcher, and means what the page says.

DeepSpeed's are launched too where it is installed, on two processes over gloo (accelerate has FSDP on GPUs only).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from transformers import AutoModelForCausalLM

from shoal.testing import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


def environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `accelerate launch` hands to each process."""
    launched = []
    for launcher in ("multi_gpu_launcher", "deepspeed_launcher"):
        monkeypatch.setattr(f"accelerate.commands.launch.{launcher}", launched.append)
    monkeypatch.setattr("accelerate.commands.launch.is_bf16_available", lambda *_: True)
    launch_command(launch_command_parser().parse_args(["--config_file", str(path), "train.py"]))
    (args,) = launched
    if args.use_deepspeed:
        return dict(prepare_deepspeed_cmd_env(args)[1])
    return dict(prepare_multi_gpu_env(args))


def test_the_page_names_every_example_and_no_other() -> None:
    named = re.findall(r"--config_file (\S+)", (ROOT / "docs" / "sharding.md").read_text())
    assert sorted(ROOT / name for name in named) == EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_launcher_reads_every_example(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(path, monkeypatch)
    assert found["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert (found.get("ACCELERATE_USE_FSDP") == "true") == path.stem.startswith("fsdp2")
    assert (found.get("ACCELERATE_USE_DEEPSPEED") == "true") == path.stem.startswith("zero")


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_offload"])
def test_fsdp_examples_are_of_the_second_version(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in environment(ROOT / "examples" / "accelerate" / f"{name}.yaml", monkeypatch).items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward and plugin.cpu_ram_efficient_loading
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert (type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy") == name.endswith("offload")


@pytest.mark.parametrize(("name", "stage"), [("zero1", "1"), ("zero2", "2"), ("zero2_offload", "2"), ("zero3", "3")])
def test_deepspeed_examples_leave_accumulation_and_clipping_to_the_settings(
    name: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = environment(ROOT / "examples" / "accelerate" / f"{name}.yaml", monkeypatch)
    assert found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
    assert found["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == found["ACCELERATE_GRADIENT_CLIPPING"] == "auto"
    offloads = found["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] == "cpu"
    assert offloads == name.endswith("offload")


# ---- launched ----

SCRIPT = Path(__file__).with_name("launched_script.py")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install 'shoal[deepspeed]')"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process comes to that divides nothing."""
    folder = tmp_path_factory.mktemp("alone")
    ended = launched([sys.executable], model_dir, folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def launched(launcher: list[str], model_dir: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, str(SCRIPT), str(model_dir), *map(str, arguments)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def accelerate_launch(name: str) -> list[str]:
    # CPUs have no mixed precision that transformers would accept without asking for the CPU.
    config = str(ROOT / "examples" / "accelerate" / f"{name}.yaml")
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--mixed_precision", "no"]


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_deepspeed_examples_train_what_one_process_does(
    name: str, model_dir: Path, alone: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    if name.endswith("offload") and not pytestconfig.getoption("--all-shardings"):
        pytest.skip("tried with --all-shardings only: DeepSpeed compiles its optimizer for CPUs first, for minutes")
    ended = launched(accelerate_launch(name), model_dir, tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    losses, expected = (json.loads((folder / "losses.json").read_text()) for folder in (tmp_path, alone))
    assert losses == pytest.approx(expected, abs=1e-3) and len(losses) == 3
    assert max(losses) - min(losses) > 0.02
    saved, whole, before = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (tmp_path / "final", alone / "final", model_dir)
    )
    for (key, value), other, first in zip(
        saved.named_parameters(), whole.parameters(), before.parameters(), strict=True
    ):
        assert (value - other).norm() < 1e-3 * (other - first).norm(), key


@needs_deepspeed
def test_on_cpus_processes_that_have_not_met_are_refused(model_dir: Path, tmp_path: Path) -> None:
    ended = launched(accelerate_launch("zero2"), model_dir, tmp_path, "unmet")
    assert ended.returncode != 0
    assert "DeepSpeed is asked for in 2 processes, each of which accelerate takes for one of 1" in ended.stderr
