"""Estimates of training against steps of one and two H200s, which benchmarks/training.py measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.bench.shapes import SHAPES, qwen3_config, shape_name
from shoal.placement.architecture import Architecture, architecture_from_config
from shoal.placement.gpu_kinds import find_gpu_kind, known_gpu_kind
from shoal.placement.step_time import Workload, training_seconds
from shoal.placement.trainer_memory import TrainerSetup, estimate_trainer_memory

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROWS = [
    json.loads(line)
    for folder in ("2026-11-29-one-h200-training", "2026-11-30-two-h200-step")
    for line in (RESULTS / folder / "training.jsonl").read_text().splitlines()
]
PROMPT_TOKENS = 64  # of benchmarks/training.py
TOLERANCE = 0.15


def _model(shape: str) -> Architecture:
    return architecture_from_config(qwen3_config(SHAPES[shape_name(shape)]).to_dict())


def _is_compiled(row: dict[str, Any]) -> bool:
    return bool(row["code"].startswith("blocks compiled")) and row["settings"]["compile"] != "no"


def _setup(row: dict[str, Any]) -> TrainerSetup:
    """Return how a row was trained. A pass holds whole sequences, here all of one length, and no more than a step."""
    settings = row["settings"]
    length = PROMPT_TOKENS + settings["completion_tokens"]
    return TrainerSetup(
        method="lora" if settings["lora_rank"] else "full",
        lora_rank=settings["lora_rank"],
        dtype=settings["dtype"],
        checkpoints=not settings["no_checkpoints"],
        recomputed=row.get("recomputed"),
        compiled=_is_compiled(row),
        lean=row.get("is_lean", False),
        sharding=settings["sharding"],
        num_ranks=_num_ranks(row),
        micro_batch_tokens=min(row["tokens_of_a_pass"] // length, settings["completions"]) * length,
    )


def _num_ranks(row: dict[str, Any]) -> int:
    return 1 if row["settings"]["sharding"] == "ddp" else 2


def _work(row: dict[str, Any]) -> Workload:
    tokens = row["settings"]["completion_tokens"]
    return Workload(
        num_prompts=row["settings"]["completions"] // 8,
        num_generations=8,
        prompt_tokens=PROMPT_TOKENS,
        completion_tokens=tokens,
        mean_completion_tokens=tokens,
    )


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['name']}, {row['code'][:6]}" for row in ROWS])
def test_memory_and_time_are_within_15_percent_of_what_was_measured(row: dict[str, Any]) -> None:
    model, setup, gpu = _model(row["settings"]["model_shape"]), _setup(row), find_gpu_kind(row["device"])
    assert gpu is not None
    peak = estimate_trainer_memory(model, setup).total
    seconds, flops = training_seconds(model, gpu, setup, _work(row))
    measured = row["peak_bytes"], row["train_s_median"]
    print(
        f"{row['name']:<16}{peak / 2**30:6.1f} GiB of {measured[0] / 2**30:6.1f} ({peak / measured[0] - 1:+.1%}), "
        f"{seconds:5.2f} s of {measured[1]:5.2f} ({seconds / measured[1] - 1:+.1%})"
    )
    assert flops == pytest.approx(row["training_flops"], rel=0.01)
    assert peak == pytest.approx(measured[0], rel=TOLERANCE)
    assert seconds == pytest.approx(measured[1], rel=TOLERANCE)


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['name']}, {row['code'][:6]}" for row in ROWS])
def test_an_estimate_that_takes_compiled_blocks_for_uncompiled_ones_is_found_out(row: dict[str, Any]) -> None:
    model, setup = _model(row["settings"]["model_shape"]), _setup(row)
    other = replace(setup, compiled=not setup.compiled)
    seconds, _ = training_seconds(model, known_gpu_kind("H200"), other, _work(row))
    assert seconds != pytest.approx(row["train_s_median"], rel=TOLERANCE)


@given(
    shape=st.sampled_from(["1.4b", "8b"]),
    method=st.sampled_from(["full", "lora"]),
    sharding=st.sampled_from(["ddp", "fsdp2"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    compiled=st.booleans(),
    tokens=st.integers(64, 100_000),
    counts=st.tuples(st.integers(0, 36), st.integers(0, 36)),
)
def test_computing_more_blocks_again_takes_no_more_memory_and_no_less_time(
    shape: str, counts: tuple[int, int], tokens: int, **options: Any
) -> None:
    model, work = _model(shape), _work(ROWS[0])
    setups = [
        TrainerSetup(recomputed=count, micro_batch_tokens=tokens, num_ranks=2, **options) for count in sorted(counts)
    ]
    few, many = (estimate_trainer_memory(model, setup).total for setup in setups)
    assert many <= few
    fast, slow = (training_seconds(model, known_gpu_kind("H200"), setup, work)[0] for setup in setups)
    assert fast <= slow
