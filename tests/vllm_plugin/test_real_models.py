"""Slice plans on real vLLM models, loaders and layouts, on CPUs and without servers.

Each layout starts its worker processes once; `real_models.py` is what they run. A failure names the values that differ
from what vLLM loads itself.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("real_models.py")
TIMEOUT_S = 300
TENSOR_PARALLEL, PIPELINE_PARALLEL = (2, 1), (1, 2)
LAYOUTS = [(1, 1), TENSOR_PARALLEL, PIPELINE_PARALLEL]

Findings = dict[str, list[dict[str, Any]]]


def _load(name: str) -> Any:
    """Import a file that lies beside this one and belongs to no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


MODEL_CASES = _load("model_cases")
CASES = [
    pytest.param(layout, name, id=f"tp{layout[0]}-pp{layout[1]}-{name}")
    for layout in LAYOUTS
    for name in MODEL_CASES.names_of_cases(layout[1])
]


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, int]], Findings]:
    """Return what gives a layout's findings: for each case, one of each rank."""

    @cache
    def find(layout: tuple[int, int]) -> Findings:
        folder = tmp_path_factory.mktemp(f"tp{layout[0]}-pp{layout[1]}")
        _run(layout, folder)
        ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("found-rank*.json"))]
        assert len(ranks) == layout[0] * layout[1]
        return {name: [rank[name] for rank in ranks] for name in ranks[0]}

    return find


def _run(layout: tuple[int, int], folder: Path) -> None:
    tp, pp = layout
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(tp * pp):
        with (folder / f"rank{rank}.log").open("w") as log:
            command = [sys.executable, str(SCRIPT), "--tp", str(tp), "--pp", str(pp), "--rank", str(rank)]
            command += ["--port", str(port), "--folder", str(folder)]
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(tp * pp))
    assert codes == [0] * len(codes), logs


@pytest.mark.parametrize(("layout", "case"), CASES)
def test_a_plan_carried_out_leaves_what_vllm_loads_itself(
    findings: Callable[[tuple[int, int]], Findings], layout: tuple[int, int], case: str
) -> None:
    for rank, found in enumerate(findings(layout)[case]):
        assert "error" not in found, found.get("error")
        print(
            f"tp{layout[0]} pp{layout[1]} {case} rank {rank}: {found['num_slices']} slices, "
            f"{len(found['reloaded'])} of {found['num_parameters']} parameters reloaded, {found['seconds']:.1f} s"
        )
        assert found["differing"] == [[]] * MODEL_CASES.ROUNDS
        # Controls: each round changed every weight; dummy weights, and two slices exchanged, are seen to be wrong.
        assert found["still"] == [[]] * MODEL_CASES.ROUNDS
        assert len(found["dummy_differing"]) >= found["num_computing"] > 0
        assert found["swapped_differing"]


def test_ranks_of_a_tensor_parallel_engine_hold_different_parts(
    findings: Callable[[tuple[int, int]], Findings],
) -> None:
    for name, (first, second) in findings(TENSOR_PARALLEL).items():
        assert first["source_regions"] != second["source_regions"], name


def test_a_single_kv_head_goes_to_both_ranks(findings: Callable[[tuple[int, int]], Findings]) -> None:
    first, second = ({tuple(r) for r in f["source_regions"]} for f in findings(TENSOR_PARALLEL)["llama-one-kv-head"])
    both = {name for name, _, _ in first & second}
    assert {"model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"} <= both
    assert "model.layers.0.self_attn.q_proj.weight" not in both


def test_each_pipeline_stage_asks_for_its_own_layers(findings: Callable[[tuple[int, int]], Findings]) -> None:
    for name, stages in findings(PIPELINE_PARALLEL).items():
        layers = [{r[0].split(".")[2] for r in f["source_regions"] if ".layers." in r[0]} for f in stages]
        assert layers == [{"0", "1"}, {"2", "3"}], name
