"""What a trainer has done remains, however it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.bench import step
from shoal.bench.step_progress import StepProgress
from shoal.bench.step_report import StepReport, step_flops
from shoal.bench.step_run import StepRun
from shoal.bench.step_settings import StepSettings

RAGGED = StepSettings(
    model_shape="tiny", device="cpu", num_prompts=2, num_generations=2, prompt_tokens=8, completion_tokens=20,
    is_ragged=True, steps=2, warmup_steps=1, trl_micro_batch=2,
)  # fmt: skip
FIXED = replace(RAGGED, is_ragged=False, completion_tokens=12)
BOTH = StepRun(parts=(FIXED, RAGGED))


def _times(num_steps: int) -> dict[str, Any]:
    """Return what a trainer has written down after so many steps, of 1 s, 2 s and so on."""
    return {
        "step_s": [float(step + 1) for step in range(num_steps)],
        "phases": {"train": [1.0] * num_steps},
        "tokens": [40] * num_steps,
        "peak_bytes": [step + 1 for step in range(num_steps)],
        "notes": [],
    }


def _trainer(num_steps: int, then: str) -> list[str]:
    """Return a command that writes down so many steps and does something else."""
    script = (
        "import os, pathlib, signal, sys, time\n"
        "path = pathlib.Path(sys.argv[1])\n"
        f"path.with_suffix('.new').write_text({json.dumps(_times(num_steps))!r})\n"
        f"path.with_suffix('.new').replace(path)\n{then}\n"
    )
    return [sys.executable, "-c", script]


def _run(
    commands: dict[str, list[str]], output: Path, monkeypatch: pytest.MonkeyPatch, *, timeout_s: float = 60
) -> bool:
    def stand_in(module: str, words: list[str], num_ranks: int) -> list[str]:
        return [*commands[module.rpartition("_")[2]], *words]

    monkeypatch.setattr(step, "with_ranks", stand_in)
    monkeypatch.setattr(step, "why_not_trl", lambda settings: None)
    return step.run_step_bench(BOTH, (), output=output, skip_trl=False, timeout_s=timeout_s)


def _stored(output: Path) -> list[dict[str, Any]]:
    return [json.loads(output.with_stem(f"{output.stem}-{kind}").read_text()) for kind in ("fixed", "ragged")]


def test_one_start_of_each_trainer_gives_the_figures_of_both_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "step.json"
    assert _run({"shoal": _trainer(6, ""), "trl": _trainer(6, "")}, output, monkeypatch)
    fixed, ragged = _stored(output)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()[-2:]] == [fixed, ragged]
    assert fixed["shoal"]["samples"] == fixed["trl"]["samples"] == [2.0, 3.0]
    assert ragged["shoal"]["samples"] == [5.0, 6.0] and ragged["shoal"]["peak_bytes"] == 6
    assert fixed["shoal"]["peak_bytes"] == 3 and fixed["reasons"] == ragged["reasons"] == {}
    assert "part 2 of 2" in ragged["shoal"]["notes"][0]


def test_a_trainer_that_takes_too_long_keeps_the_steps_that_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "step.json"
    slow = _trainer(2, "print('step 3', flush=True); time.sleep(600)")
    assert _run({"shoal": _trainer(6, ""), "trl": slow}, output, monkeypatch, timeout_s=4)
    fixed, ragged = _stored(output)
    assert fixed["trl_step_s"] == 2.0 and fixed["ratio_to_trl"] == 0.8
    assert fixed["reasons"] == {"trl": "only 1 of 2 steps were measured: it took more than 4 s; last words: step 3"}
    assert ragged["trl"] is None and "it took more than 4 s" in ragged["reasons"]["trl"]


def test_a_benchmark_that_is_told_to_end_ends_its_trainer_and_keeps_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, noted = tmp_path / "step.json", tmp_path / "pid"
    tells = f"pathlib.Path({str(noted)!r}).write_text(str(os.getpid()))\n"
    tells += "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)"
    before = signal.getsignal(signal.SIGTERM)
    assert not _run({"shoal": _trainer(5, tells)}, output, monkeypatch)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), 0)
    fixed, ragged = _stored(output)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()[-2:]] == [fixed, ragged]
    told = "the benchmark was told to end (SIGTERM)"
    assert fixed["step_s"] == 2.5 and fixed["reasons"] == {"trl": told}
    assert ragged["step_s"] == 5.0
    assert ragged["reasons"] == {"shoal": f"only 1 of 2 steps were measured: {told}", "trl": told}


def test_a_trainer_that_fails_after_its_last_step_keeps_its_figures_and_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "step.json"
    assert not _run({"shoal": _trainer(6, "raise SystemExit('it broke')"), "trl": _trainer(6, "")}, output, monkeypatch)
    fixed, ragged = _stored(output)
    assert fixed["reasons"] == {} and ragged["step_s"] == 5.5
    assert "all steps were measured, but then: its process ended with status 1" in ragged["reasons"]["shoal"]


def test_results_are_stored_while_the_trainer_runs_and_a_finished_part_is_left_alone(tmp_path: Path) -> None:
    answer, output = tmp_path / "shoal.json", tmp_path / "step.json"
    reports = [
        StepReport(settings=part, device_names=["CPU"], path=output.with_stem(f"step-{part.lengths_name}"))
        for part in BOTH.parts
    ]
    peaks = iter(range(100))
    progress = StepProgress("shoal", reports, answer, lambda: next(peaks))
    progress.look()
    assert not list(tmp_path.iterdir())
    for num_steps, reason in (
        (1, "it was still running"),
        (2, "only 1 of 2 steps were measured: it was still running"),
    ):
        answer.write_text(json.dumps(_times(num_steps)))
        progress.look()
        assert _stored(output)[0]["reasons"] == {"shoal": reason}
    answer.write_text(json.dumps(_times(3)))
    progress.look()
    before = _stored(output)[0]["shoal"]
    answer.write_text(json.dumps(_times(6)))
    progress.look()
    progress.look()
    progress.end(None)
    fixed, ragged = _stored(output)
    assert fixed["shoal"] == before and before["device_peak_bytes"] < ragged["shoal"]["device_peak_bytes"]
    assert fixed["reasons"] == ragged["reasons"] == {}


def test_the_mfu_of_fewer_steps_is_of_their_own_operations() -> None:
    first = step_flops(RAGGED, num_steps=1)
    assert first == step_flops(replace(RAGGED, steps=1)) != step_flops(RAGGED)
