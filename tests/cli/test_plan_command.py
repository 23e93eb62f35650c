"""`shoal plan` prints the plan for a machine that need not be there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.cli.main import main


def test_the_plan_is_a_small_table_with_a_line_for_each_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "5", "--tp", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "trainer-0  cuda:0",
        "engine-0   cuda:1, cuda:2; TP 2",
        "engine-1   cuda:3, cuda:4; TP 2",
    ]


def test_shared_and_idle_gpus_are_shown_with_their_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "3", "--vllm-devices", "cuda:0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["engine-0   cuda:0; shared with the trainer", "idle       cuda:1, cuda:2"]
    assert [line.startswith("warning: ") for line in lines[3:]] == [True, True]


def test_cpu_engines_are_shown_with_their_cores(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "0", "--cores", "4"]) == 0
    assert "engine-1   cpu, cores 2, 3" in capsys.readouterr().out


def test_json_holds_the_whole_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--devices", "0-2", "--num-engines", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [engine["devices"][0]["index"] for engine in plan["engines"]] == [1]
    assert [device["index"] for device in plan["idle"]] == [2]
    assert len(plan["warnings"]) == 1


def test_a_model_s_heads_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"num_attention_heads": 9, "num_key_value_heads": 3}')
    assert main(["plan", "--gpus", "3", "--tp", "2", "--model", str(tmp_path)]) == 2
    assert "9 attention heads" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--gpus", "2", "--tp", "2"],
        ["--gpus", "-1"],
        ["--cores", "0"],
        ["--devices", "auto"],
        ["--gpus", "1", "--vllm-devices", "cuda:1,x"],
        ["--model", "/nowhere"],
    ],
)
def test_a_refusal_is_one_paragraph_on_stderr_and_exit_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("shoal plan: ")
    assert printed.err.count("\n") == 1


def test_planning_loads_neither_torch_nor_vllm() -> None:
    code = (
        "import sys\nfrom shoal.cli.main import main\nmain(['plan', '--gpus', '4'])\n"
        "sys.exit(bool({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
