"""Which layouts are measured where, by which commands, and what becomes of failures."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.bench import many_gpus
from shoal.bench.children import StageError
from shoal.bench.layouts import TINY, MachineLayout, Work, commands_for, layouts_for
from shoal.bench.many_gpus import LayoutResult, compare, describe, last_json, left_behind, run_layouts
from shoal.cli import bench, bench_step
from shoal.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ONE = MachineLayout(num_ranks=1, num_engines=1, source="plain")


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("num_gpus", "names"),
    [
        (2, ["plain-1-to-1xtp1", "ddp-2-to-2xtp1-colocated"]),
        (3, ["plain-1-to-1xtp1", "ddp-2-to-2xtp1-colocated", "ddp-3-to-3xtp1-colocated"]),
        (
            4,
            [
                "plain-1-to-1xtp1",
                "fsdp2-2-to-2xtp1",
                "fsdp2-2-to-1xtp2",
                "fsdp2-3-to-1xtp1",
                "ddp-4-to-4xtp1-colocated",
            ],
        ),
        (
            8,
            [
                "plain-1-to-1xtp1",
                "fsdp2-4-to-4xtp1",
                "fsdp2-4-to-2xtp2",
                "fsdp2-4-to-1xtp4",
                "fsdp2-6-to-2xtp1",
                "ddp-8-to-8xtp1-colocated",
            ],
        ),
    ],
)
def test_each_size_of_host_has_its_layouts(num_gpus: int, names: list[str]) -> None:
    assert [layout.name for layout in layouts_for(num_gpus)] == names


@given(num_gpus=st.integers(2, 64))
def test_every_layout_fits_its_host_and_one_of_them_uses_all_of_it(num_gpus: int) -> None:
    sizes = [layout.num_gpus for layout in layouts_for(num_gpus)]
    assert max(sizes) == num_gpus


def test_one_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="they take 2, 4, 8 or more"):
        layouts_for(1)


@pytest.mark.parametrize("num_gpus", [2, 4, 8])
def test_every_command_is_one_that_its_subcommand_takes(num_gpus: int, tmp_path: Path) -> None:
    import argparse

    from shoal.bench.step_settings import StepSettings, check_step

    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    for layout in layouts_for(num_gpus):
        commands = commands_for(layout, Work(), tmp_path)
        assert ("rollouts" in commands) == (layout.tensor_parallel_size == 1 and not layout.is_colocated)
        weights = parser.parse_args(commands["weights"][commands["weights"].index("bench") + 1 :])
        assert (weights.source, weights.tp, weights.colocate) == (
            layout.source,
            layout.tensor_parallel_size,
            layout.is_colocated,
        )
        assert ("torch.distributed.run" in commands["weights"]) == (layout.num_ranks > 1)
        step = parser.parse_args(commands["step"][commands["step"].index("bench") + 1 :])
        settings = StepSettings(
            model_shape=step.model_shape,
            device=step.device,
            layout=step.layout,
            num_ranks=step.ranks,
            num_engines=step.num_engines,
            tensor_parallel_size=step.tp,
            num_prompts=step.prompts,
            trl_micro_batch=step.trl_micro_batch,
            sharding=step.sharding,
        )
        check_step(settings, num_gpus)
        assert settings.num_gpus == layout.num_gpus
    assert bench_step.add_step_arguments is not None


def test_expectations_are_compared_with_what_was_found() -> None:
    two = LayoutResult(layout=ONE, figures={"step": {"step_s": 8.0}})
    four = LayoutResult(
        layout=MachineLayout(num_ranks=4, num_engines=1, tensor_parallel_size=4),
        figures={"weights": {"total_ms": 61.0, "wire_ms": 50.0, "raw_p2p_ms": 45.0, "proven": True},
                 "step": {"step_s": 5.0, "phases": {"train": 3.0}, "peak_bytes": 2**30}},
    )  # fmt: skip
    wide = LayoutResult(
        layout=MachineLayout(num_ranks=4, num_engines=4),
        figures={"rollouts": {"tokens_per_s": 390.0}, "rollouts_one": {"tokens_per_s": 100.0}, "step": {"step_s": 9.0}},
    )
    assert compare([two, four, wide], Work()) == [
        "fsdp2-4-to-1xtp4: publish 61 ms, expected <= 60 ms: MISSED",
        "fsdp2-4-to-4xtp1: rollouts 0.975, expected >= 0.95: met",
        "fsdp2-4-to-1xtp4: step 5 s, expected <= 8 s: met",
        "fsdp2-4-to-4xtp1: step 9 s, expected <= 8 s: MISSED",
    ]
    assert describe(four, Work())[0] == "publish of qwen3-8b: 61.0 ms, 90% of the raw rate, proven"


def test_the_last_line_that_is_json_is_taken(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('{"a": 1}\nwords\n{"a": 2}\na warning at exit\n')
    assert last_json(log) == {"a": 2}
    log.write_text("words\n")
    with pytest.raises(StageError, match="no JSON object"):
        last_json(log)


def test_a_part_that_fails_or_leaves_a_process_is_told_and_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stays = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print('{}')"
    )
    parts: dict[Any, list[str]] = {
        "weights": [sys.executable, "-c", "raise SystemExit('no such flag')"],
        "rollouts": [sys.executable, "-c", stays],
        "step": [sys.executable, "-c", 'print(\'{"step_s": 1.5, "peak_bytes": 1, "phases": {}}\')'],
    }
    monkeypatch.setattr(many_gpus, "commands_for", lambda layout, work, folder: parts)
    monkeypatch.setattr(many_gpus, "_SETTLE_S", 0.5)
    (result,) = run_layouts([ONE], replace(TINY, timeout_s=60), tmp_path / "out", ["CPU"])
    assert "no such flag" in result.reasons["weights"]
    assert len(result.left_behind) == 1
    assert not _lives(int(result.left_behind[0].split()[0]))
    assert result.step_s == 1.5
    assert "step of tiny: 1.50 s" in capsys.readouterr().out
    assert (tmp_path / "out" / "summary.json").exists()


def test_processes_are_found_by_their_mark() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], env={many_gpus._MARK: "marked-by-this-test"}
    )
    try:
        deadline = time.monotonic() + 30
        while not (found := left_behind("marked-by-this-test", 0.0)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [text.split()[0] for text in found] == [str(child.pid)]
    finally:
        child.kill()
        child.wait()
    assert left_behind("marked-by-this-test", 0.0) == []


def test_a_dry_run_prints_commands_for_any_machine() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.many_gpus", "--dry-run", "--gpus", "8", "--only", "fsdp2-4-to-1xtp4"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "# fsdp2-4-to-1xtp4, 8 GPUs" and len(lines) == 3
    assert "--nproc-per-node 4 -m shoal bench weights" in lines[1] and "--tp 4" in lines[2]
