"""The step benchmark: the same work for every trainer, figures that follow from it, and one run as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal.bench import step, step_shoal
from shoal.bench.children import StageError
from shoal.bench.launch import run_to_end, with_ranks
from shoal.bench.shapes import SHAPES
from shoal.bench.step_child import StepTimes
from shoal.bench.step_report import StepReport, architecture_of, measured_from, step_flops
from shoal.bench.step_run import StepRun
from shoal.bench.step_settings import StepSettings, check_step, make_dataset, reward, write_model
from shoal.bench.step_shoal import FixedWorkTrainer, shoal_config
from shoal.bench.step_trl import trl_arguments
from shoal.errors import ConfigError
from shoal.placement.devices import Device
from shoal.testing.trainer import ReferenceTrainer

CPU = StepSettings(
    model_shape="tiny", device="cpu", num_prompts=2, num_generations=2, prompt_tokens=8, completion_tokens=20,
    is_ragged=True, steps=2, warmup_steps=1, trl_micro_batch=2,
)  # fmt: skip
RUN = StepRun(parts=(replace(CPU, is_ragged=False, completion_tokens=12), CPU))
CUDA = StepSettings(model_shape="qwen3-1.4b", device="cuda")


def test_ragged_lengths_are_uniform_the_same_again_and_another_each_step() -> None:
    settings = replace(CUDA, is_ragged=True, completion_tokens=1024, num_prompts=256)
    first = settings.lengths(0)
    assert first == settings.lengths(0) != settings.lengths(1)
    assert min(first) >= 16 and max(first) <= 1024
    assert sum(first) / len(first) == pytest.approx(520, rel=0.05)
    assert set(CUDA.lengths(3)) == {510}


def test_the_work_of_the_issue_is_1_4_billion_parameters_and_its_operations() -> None:
    model = architecture_of(SHAPES["qwen3-1.4b"])
    assert model.num_parameters == 1_510_073_344
    tokens = 256 * 574
    assert step_flops(CUDA) == pytest.approx(6 * tokens * (model.matmul_parameters + 28 * 2048 * 574), rel=1e-9)


class _ReferenceFixedWork(FixedWorkTrainer, ReferenceTrainer):
    """Writes with transformers instead of an engine."""


def test_every_completion_is_written_to_its_length_whatever_would_end_it(tmp_path: Path) -> None:
    write_model(CPU, tmp_path / "model")
    trainer: Any = _ReferenceFixedWork(
        model=str(tmp_path / "model"),
        reward_funcs=reward,
        args=shoal_config(RUN, tmp_path / "run"),
        train_dataset=make_dataset(CPU),
    )
    trainer.bench, trainer.times = RUN, StepTimes()
    seen: list[list[int]] = []
    judge = trainer._judge.compare

    def compare(groups: Any) -> Any:
        seen.append([len(rollout.token_ids) for group in groups for rollout in group.rollouts])
        return judge(groups)

    trainer._judge.compare = compare
    trainer.train()
    assert seen == [[12] * 4] * 3 + [CPU.lengths(index) for index in range(3)]
    assert trainer.times.tokens == [sum(lengths) for lengths in seen]


def test_shoals_process_writes_down_each_step_and_phase_as_soon_as_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = StepTimes.write

    def count(times: StepTimes, path: Path) -> None:
        write(times, path)
        found = json.loads(path.read_text())
        assert {len(seconds) for seconds in found["phases"].values()} == {len(found["step_s"])}
        written.append(len(found["step_s"]))

    write_model(CPU, tmp_path / "model")
    monkeypatch.setattr(StepTimes, "write", count)
    monkeypatch.setattr(step_shoal, "FixedWorkTrainer", _ReferenceFixedWork)
    monkeypatch.setattr("sys.argv", ["step_shoal", str(tmp_path / "answer.json"), str(tmp_path), RUN.to_json()])
    step_shoal.main()
    assert sorted(set(written)) == [1, 2, 3, 4, 5, 6]
    data = json.loads((tmp_path / "answer.json").read_text())
    fixed, ragged = (measured_from(RUN, index, data, device_peak_bytes=0) for index in (0, 1))
    assert fixed is not None and ragged is not None
    assert list(fixed.tokens) == [48, 48]
    assert list(ragged.tokens) == [sum(CPU.lengths(index)) for index in (1, 2)]
    for found in (fixed, ragged):
        assert len(found.samples) == CPU.steps and found.peak_bytes > 1 << 20
        assert set(found.phases) == {"generate", "train", "publish"}
        shares = [
            sum(samples[index] for samples in found.phase_samples.values()) / seconds
            for index, seconds in enumerate(found.samples)
        ]
        assert all(0 < share <= 1 for share in shares)
        assert max(shares) > 0.5  # not of each step: a machine with other work may halt between two phases


@pytest.mark.parametrize("fails", [False, True])
def test_both_trainers_are_run_stored_and_compared_or_missed_with_the_reason(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stand_in(module: str, words: list[str], num_ranks: int) -> list[str]:
        seconds = 2.0 if module.endswith("shoal") else 5.0
        answer = {"step_s": [9.0] + [seconds] * 2, "phases": {"train": [1.0] * 3}, "tokens": [40] * 3,
                  "peak_bytes": [1] * 3,
                  "notes": []}  # fmt: skip
        write = f"import pathlib, sys; pathlib.Path(sys.argv[1]).write_text({json.dumps(answer)!r})"
        return [sys.executable, "-c", "raise SystemExit('it broke')" if fails else write, *words]

    monkeypatch.setattr(step, "with_ranks", stand_in)
    monkeypatch.setattr(step, "why_not_trl", lambda settings: None)
    output = tmp_path / "out" / "step.json"
    run = StepRun(parts=(CPU,))
    assert step.run_step_bench(run, (), output=output, skip_trl=False, timeout_s=60) is not fails
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads(output.read_text())
    if fails:
        assert "it broke" in last["reasons"]["shoal"] and "it broke" in last["reasons"]["trl"]
    else:
        assert (last["step_s"], last["trl_step_s"], last["ratio_to_trl"]) == (2.0, 5.0, 2.5)
        assert last["tokens_per_s"] == 20.0


def test_trl_sees_the_trainers_gpus_and_not_those_of_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str] = {}

    def note(command: Any, log: Path, *, environment: dict[str, str], **_: Any) -> None:
        seen[log.stem] = environment["CUDA_VISIBLE_DEVICES"]

    monkeypatch.setattr(step, "run_to_end", note)
    monkeypatch.setattr(step, "_probe", lambda devices: lambda: 0)
    monkeypatch.setattr(step, "write_model", lambda settings, folder: None)
    monkeypatch.setattr(step, "why_not_trl", lambda settings: None)
    monkeypatch.setattr(step, "trl_server", lambda *_: nullcontext("http://127.0.0.1:1"))
    gpus = [
        Device(kind="cuda", index=index, memory_bytes=1, name="GPU", visible_id=f"GPU-{index}") for index in range(4)
    ]
    for settings, of_shoal, of_trl in (
        (replace(CUDA, num_ranks=2), "GPU-0,GPU-1,GPU-2", "GPU-0,GPU-1"),
        (replace(CUDA, layout="colocated", num_ranks=2, num_engines=2), "GPU-0,GPU-1", "GPU-0,GPU-1"),
    ):
        step.run_step_bench(StepRun(parts=(settings,)), gpus, output=tmp_path / "step.json", skip_trl=False)
        assert seen == {"shoal": of_shoal, "trl": of_trl}


@pytest.mark.parametrize("sleeps", [False, True])
def test_colocated_engines_sleep_in_both_trainers_or_in_neither(
    sleeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_shoal, "GRPOConfig", lambda **values: values)  # the real one looks for GPUs
    run = StepRun(parts=(replace(CUDA, layout="colocated", sleeps=sleeps),))
    ours: Any = shoal_config(run, tmp_path)
    for values in (ours, trl_arguments(run, tmp_path, "")):
        assert values["vllm_enable_sleep_mode"] is sleeps


def test_medians_leave_the_warm_up_out_and_the_ratio_is_trl_over_shoal() -> None:
    settings = replace(CUDA, steps=3, warmup_steps=2)
    ours = {
        "step_s": [90.0, 50.0, 4.0, 6.0, 5.0],
        "phases": {"generate": [9.0, 9.0, 1.0, 3.0, 2.0], "train": [9.0, 9.0, 3.0, 2.0, 2.5]},
        "tokens": [1, 1, 100, 100, 100],
        "peak_bytes": [5, 7, 6, 6, 6],
        "notes": [],
    }
    theirs = ours | {"step_s": [0.0, 0.0, 15.0, 14.0, 16.0]}
    run = StepRun(parts=(settings,))
    report = StepReport(settings=settings, device_names=["NVIDIA H100 80GB HBM3"], path=Path("unused"))
    report.take("shoal", measured_from(run, 0, ours, device_peak_bytes=9), "")
    report.take("trl", measured_from(run, 0, theirs, device_peak_bytes=9), "")
    data = report.to_dict()
    assert (data["step_s"], data["trl_step_s"], data["ratio_to_trl"]) == (5.0, 15.0, 3.0)
    assert data["phases"] == {"generate": 2.0, "train": 2.5}
    assert data["peak_bytes"] == 7 and data["reasons"] == {}
    assert data["tokens_per_s"] == 20.0 and data["layout"] == "dedicated"
    assert data["mfu"] == pytest.approx(step_flops(settings) / 2.5 / 989e12)
    assert json.loads(json.dumps(data)) == data
    unknown = StepReport(
        settings=settings, device_names=["CPU"], path=Path("unused"), found={"shoal": report.found["shoal"]}
    )
    assert unknown.to_dict()["mfu"] is None and unknown.to_dict()["ratio_to_trl"] is None


@pytest.mark.parametrize(
    ("changes", "num_gpus", "says"),
    [
        ({}, 1, "2 GPUs are needed"),
        ({"layout": "colocated", "num_engines": 2}, 1, "2 GPUs are needed"),
        ({"completion_tokens": 4096}, 2, r"do not fit into the 2048 .* at most --tokens 1984"),
        ({"completion_tokens": 4096, "is_ragged": True}, 2, "at most --ragged-tokens 1984"),
        ({"completion_tokens": 15, "is_ragged": True}, 2, "--ragged-tokens 15 is too few. Give at least 16"),
        ({"num_ranks": 3}, 4, "do not divide by 3 trainer processes"),
        ({"num_generations": 1}, 2, "nothing to compare"),
        ({"steps": 0}, 2, "steps=0"),
        ({"sharding": "fsdp2"}, 2, "for several trainer processes"),
        ({"device": "cpu", "num_ranks": 2}, 0, "on CPUs one trainer process"),
    ],
)
def test_what_cannot_be_run_is_refused_with_what_to_do(changes: dict[str, Any], num_gpus: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_step(replace(CUDA, **changes), num_gpus)
    check_step(CUDA, 2)


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "open(sys.argv[1], 'w').write(str(child.pid))\n"
        "print('began', flush=True)\n"
        "time.sleep(600)\n"
    )
    noted = tmp_path / "pid"
    began = time.monotonic()
    with pytest.raises(StageError, match=r"it took more than 5 s; last words: began"):
        command = [sys.executable, "-c", script, str(noted)]
        run_to_end(command, tmp_path / "log", timeout_s=5, environment={})
    assert time.monotonic() - began < 60
    assert not psutil.pid_exists(int(noted.read_text())) or psutil.Process(int(noted.read_text())).status() == "zombie"
    with pytest.raises(StageError, match="status 3"):
        run_to_end([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", timeout_s=60, environment={})


def test_several_ranks_are_started_through_torchrun() -> None:
    assert with_ranks("some.module", ["a"], 1) == [sys.executable, "-m", "some.module", "a"]
    command = with_ranks("some.module", ["a"], 4)
    assert command[1:3] == ["-m", "torch.distributed.run"] and command[-3:] == ["-m", "some.module", "a"]
    assert command[command.index("--nproc-per-node") + 1] == "4"


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_run_on_cpus_ends_with_the_figures_of_both_parts(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--bench-engines"):
        pytest.skip("starts an engine for what is tried above with the exact one; run with --bench-engines")
    words = "bench step --device cpu --model-shape tiny --prompts 2 --samples 2 --prompt-tokens 8 --lengths both "
    words += "--tokens 12 --ragged-tokens 20 --steps 2 --warmup-steps 1 --trl-micro-batch 2 --skip-trl"
    output = tmp_path / "out" / "step.json"
    done = subprocess.run(
        [sys.executable, "-m", "shoal", *words.split(), "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=800,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for line, part in zip(done.stdout.splitlines()[-2:], RUN.parts, strict=True):
        found = json.loads(line)
        assert found == json.loads((output.parent / f"step-{part.lengths_name}.json").read_text())
        assert found["settings"] == asdict(part)
        assert found["shoal"]["tokens"] == [sum(part.lengths(index)) for index in (1, 2)]
        assert set(found["phases"]) == {"generate", "train", "publish"}
        assert sum(found["phases"].values()) <= found["step_s"] * 1.5
        assert found["reasons"] == {"trl": "left out (--skip-trl)"} and found["mfu"] is None
        assert found["peak_bytes"] > 1 << 20
