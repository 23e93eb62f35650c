"""What the ranks of a sharded model hold, put together, is the whole model, bit for bit."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

MODELS = ["llama", "tied", "mixtral", "transposed", "lora", "lora_bias", "dora", "experts"]
FSDP2 = [*(f"{name}-{kind}" for name in MODELS for kind in ("fsdp2", "hsdp")), "adapter-fsdp2", "evaluated-fsdp2"]
ZERO3 = [f"{name}-{kept}" for name in MODELS if name != "lora_bias" for kept in (0, 200)]

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install 'shoal[deepspeed]')"
)


@functools.cache
def ranks(kind: str, world_size: int) -> list[dict[str, Any]]:
    """Run `ranks.py` once for all tests, and return what each rank wrote."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("ranks.py")), kind, str(rank), str(world_size), folder],
                env=os.environ | {"DS_ACCELERATOR": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            outputs = [process.communicate(timeout=240)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, output in zip(processes, outputs, strict=True):
            assert process.returncode == 0, output[-3000:]
        return [torch.load(Path(folder, f"rank{rank}.pt"), weights_only=False) for rank in range(world_size)]


def put_together(parts: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Lay what the ranks hold side by side; where several hold the same, they must agree."""
    whole = {}
    for name, shape in parts[0]["metadata"]:
        value = torch.full((torch.Size(shape).numel(),), float("nan"))
        for part in parts:
            start, stop = part["held"].get(name, (0, 0))
            piece = part["tensors"][name]
            assert piece.shape == (stop - start,), name
            there = value[start:stop]
            assert torch.equal(there[~there.isnan()], piece[~there.isnan()]), name
            value[start:stop] = piece
        whole[name] = value
    return whole


def check(parts: list[dict[str, Any]]) -> None:
    expected = parts[0]["expected"]
    for part in parts:
        assert part["metadata"] == expected["metadata"]
        assert list(part["tensors"]) == [name for name, _ in expected["metadata"]]
    whole = put_together(parts)
    for name, value in expected["tensors"].items():
        assert torch.equal(whole[name], value), name


@pytest.mark.parametrize("scenario", [*FSDP2, "compiled-fsdp2"])
def test_the_rows_of_all_fsdp2_ranks_are_the_whole_model(scenario: str) -> None:
    check([result[scenario] for result in ranks("fsdp2", 4)])


@pytest.mark.parametrize("scenario", ["llama-fsdp2", "llama-hsdp", "mixtral-fsdp2", "lora-fsdp2"])
def test_no_fsdp2_rank_alone_has_the_whole_model(scenario: str) -> None:
    parts = [result[scenario] for result in ranks("fsdp2", 4)]
    for missing in (0, 3):
        few = [part for rank, part in enumerate(parts) if rank != missing]
        if scenario.endswith("hsdp"):
            few = [part for rank, part in enumerate(parts) if rank % 2 != missing % 2]  # both of the replicas
        assert any(bool(value.isnan().any()) for value in put_together(few).values())


def test_ranks_without_rows_hold_nothing_and_still_go_through_every_parameter() -> None:
    parts = [result["mixtral-fsdp2"] for result in ranks("fsdp2", 4)]
    expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert [expert in part["held"] for part in parts] == [True, False, False, False]
    assert parts[3]["tensors"][expert].numel() == 0


def test_columns_are_refused_saying_what_to_use() -> None:
    for result in ranks("fsdp2", 4):
        assert "Shard(dim=1)" in result["refused"] and "fully_shard" in result["refused"]


@needs_deepspeed
@pytest.mark.parametrize("scenario", ZERO3)
def test_the_partitions_of_all_zero3_ranks_are_the_whole_model_after_a_step(scenario: str) -> None:
    parts = [result[scenario] for result in ranks("zero3", 2)]
    check(parts)
    assert any(part["changed"] for part in parts)


@needs_deepspeed
def test_no_zero3_rank_alone_has_the_whole_model() -> None:
    for scenario in ("llama-0", "llama-200"):
        for result in ranks("zero3", 2):
            assert any(bool(value.isnan().any()) for value in put_together([result[scenario]]).values())
