"""`shoal bench weights` as it is typed, on CPUs with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_it_ends_with_figures_that_are_proven_and_a_control_that_was_caught(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    if not pytestconfig.getoption("--bench-engines"):
        pytest.skip("starts an engine for what tests/weights/test_real_publish.py shows; run with --bench-engines")
    output = tmp_path / "out" / "results.json"
    words = [
        "bench",
        "weights",
        "--device",
        "cpu",
        "--model-shape",
        "tiny",
        "--repeats",
        "3",
        "--running-requests",
        "4",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "shoal", *words, "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=800,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["proven"] is True and last["control_caught"] is True
    for name in ("wire_ms", "total_ms", "total_running_ms", "raw_p2p_ms", "raw_broadcast_ms", "extra_bytes_engine"):
        assert last[name] > 0, name
    assert last["proof_ms"] is not None
    assert last["wire_ms"] < last["total_ms"]
    phases = ("wake", "pause", "wire", "prove", "resume")
    for index, total in enumerate(last["samples"]["total_ms"]):
        assert 0.5 * total < sum(last["samples"][f"idle_{phase}_ms"][index] for phase in phases) < 1.05 * total
    assert last["num_running"] >= 4 and len(last["samples"]["total_running_ms"]) == 3
    assert last["vllm_native_ms"] is None
    assert last["reasons"]["vllm_native_ms"] == "vLLM's NCCL update needs GPUs"
    # What it says it sent is the model: a whole one, in float32.
    assert last["num_bytes"] == 4 * (300 * 128 + 2 * (128 * (128 + 64 + 64 + 128 + 3 * 192) + 2 * 128 + 2 * 32) + 128)
    assert json.loads(output.read_text())["samples"] == last["samples"]
