"""Every configuration that docs/sharding.md names is read by accelerate's launcher, and means what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

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
