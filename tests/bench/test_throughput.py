"""`shoal bench rollouts` with engines: what is written, how it is counted, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.bench.engine_cpu import EngineCpu, engine_cpu
from shoal.bench.shapes import SHAPES, shape_name
from shoal.bench.throughput import Figures, Go
from shoal.bench.throughput_settings import ThroughputSettings, check_throughput, draw_groups
from shoal.cli.main import main
from shoal.errors import ConfigError

SETTINGS = ThroughputSettings(
    model_shape="tiny", device="cpu", num_samples=16, num_generations=4, tokens=32, prompt_tokens=24, repeats=2
)


def test_no_two_prompts_and_no_two_seeds_of_a_run_are_alike_and_all_are_tokens_of_the_model() -> None:
    settings = replace(SETTINGS, num_samples=256, prompt_tokens=64)
    groups = [group for go in range(8) for group in draw_groups(settings, go=go, num_engines=1)]
    assert len(groups) == 8 * 64 and all(len(group) == 4 for group in groups)
    assert all(len({request.prompt_token_ids for request in group}) == 1 for group in groups)
    assert len({group[0].prompt_token_ids for group in groups}) == len(groups)
    requests = [request for group in groups for request in group]
    assert len({request.seed for request in requests}) == len(requests)
    ids = {token for request in requests for token in request.prompt_token_ids}
    assert min(ids) >= 3 and max(ids) < SHAPES["tiny"].vocabulary
    assert {request.sampling.max_tokens for request in requests} == {32}


def test_two_engines_get_twice_the_work() -> None:
    assert [len(draw_groups(SETTINGS, go=0, num_engines=number)) for number in (1, 2)] == [4, 8]


def test_figures_are_medians_for_a_million_tokens() -> None:
    goes = [
        Go(num_tokens=1000, seconds=seconds, client_s=0.001, engines=EngineCpu(front_end=0.05, core=0.5))
        for seconds in (1.0, 4.0, 2.0)
    ]
    figures = Figures.of(goes)
    assert figures.tokens_per_s == 500
    assert figures.client_cpu_s == pytest.approx(1.0)
    assert figures.frontend_cpu_s == pytest.approx(50)
    assert figures.core_cpu_s == pytest.approx(500)


def test_processor_time_is_told_apart_by_what_processes_call_themselves() -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass\ntime.sleep(60)"
    children = [
        subprocess.Popen([name, "-c", spin], executable=sys.executable) for name in ("VLLM::EngineCore", "server")
    ]
    try:
        deadline = time.monotonic() + 60
        while (now := engine_cpu(os.getpid())) and min(now.core, now.front_end) < 0.2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert 0.2 <= now.core < 1.5 and now.front_end >= 0.2
        assert now - now == EngineCpu(front_end=0.0, core=0.0)
    finally:
        for child in children:
            child.kill()
            child.wait()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 6}, "whole prompts of 4"),
        ({"tokens": 500}, "512 that tiny engines are started for"),
        ({"device": "cuda"}, "sees none"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_throughput(replace(SETTINGS, **changes), num_gpus=0)


def test_settings_survive_the_way_to_another_process() -> None:
    assert ThroughputSettings.from_json(SETTINGS.to_json()) == SETTINGS


@pytest.mark.parametrize(
    ("words", "says"),
    [("", "--device"), ("--device cpu --group 3", "whole prompts of 3")],
)
def test_the_command_says_what_is_missing(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rollouts", *words.split()]) != 0
    assert says in capsys.readouterr().err


def test_shapes_have_short_names_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert [shape_name(text) for text in ("tiny", "8b", "qwen3-8b")] == ["tiny", "qwen3-8b", "qwen3-8b"]
    with pytest.raises(SystemExit):
        main(["bench", "rollouts", "--device", "cpu", "--model-shape", "3b"])
    assert "qwen3-1.7b" in capsys.readouterr().err


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_it_ends_with_figures_of_real_engines(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--bench-engines"):
        pytest.skip("starts four engines; run with --bench-engines")
    output = tmp_path / "results.json"
    words = [
        "bench",
        "rollouts",
        "--device",
        "cpu",
        "--samples",
        "16",
        "--group",
        "4",
        "--tokens",
        "32",
        "--repeats",
        "1",
        "--output",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "shoal", *words, str(output)], capture_output=True, text=True, timeout=850, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["weights"] == "dummy" and last["reasons"] == {}
    for name in ("tokens_per_s", "ratio_to_in_process", "ratio_two_engines", "client_cpu_s_per_million_tokens"):
        assert last[name] > 0, name
    assert last["frontend_cpu_s_per_million_tokens"] < last["stock_frontend_cpu_s_per_million_tokens"]
    assert json.loads(output.read_text()) == last
