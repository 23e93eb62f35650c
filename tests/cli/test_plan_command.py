"""`shoal plan` prints the plan for a machine that need not be there."""

from __future__ import annotations

import json
import re
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


@pytest.fixture
def qwen(tmp_path: Path) -> str:
    """Return the folder of a checkpoint of Qwen3-1.7B, without its weights."""
    config = {
        "model_type": "qwen3",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_a_model_and_a_kind_of_gpu_give_sizes_times_and_proposals(
    qwen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", qwen, "--gpus", "2xH100", "--trainer-processes", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("trainer-0  cuda:0\nengine-0   cuda:1\n")
    assert "1.721 B parameters, 112 KiB of KV cache a token; H100" in printed
    lines = printed.splitlines()
    assert ["weights", "6.41"] in [line.split() for line in lines]
    assert any(line.startswith("seconds a step: generation ") for line in lines)
    assert lines[lines.index("layouts that fit, by estimated seconds a step:") + 1].split()[1] == "2"


def test_proposals_say_what_to_set_for_passes_and_how_the_blocks_are_taken(
    qwen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--model", qwen, "--gpus", "2xH100", "--trainer-processes", "1"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "blocks: compiled one by one, " in printed
    found = re.search(r"set: .* max_tokens_per_micro_batch=(\d+) recompute_num_layers=(\d+)\n", printed)
    assert found is not None and int(found[1]) >= 16_384 and 0 < int(found[2]) < 28
    # What was proposed, given as what to estimate, is the same; and what differs is said.
    given = ["--max-tokens-per-micro-batch", found[1], "--recompute-num-layers", found[2]]
    assert main([*words, *given]) == 0
    proposals = "layouts that fit"
    assert capsys.readouterr().out.partition(proposals)[0] == printed.partition(proposals)[0]
    assert main([*words, "--no-regional-compilation"]) == 0
    assert "blocks: not compiled, " in capsys.readouterr().out
    assert main([*words, "--no-gradient-checkpointing", "--recompute-num-layers", "3"]) == 2
    assert "without --no-gradient-checkpointing" in capsys.readouterr().err


def test_json_has_the_estimate_in_bytes_and_seconds(qwen: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", qwen, "--gpus", "4xH200", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    found = data["estimate"]
    assert found["model"]["parameters"] == 1_720_574_976
    assert found["chosen"]["layout"] == found["proposals"][0]["layout"]
    assert len(data["trainers"]) == found["chosen"]["layout"]["num_trainers"]
    for device in found["chosen"]["devices"]:
        assert device["total_bytes"] <= device["limit_bytes"]
    assert found["chosen"]["seconds"]["total"] > 0


def test_a_kind_that_is_not_known_can_be_described_and_is_refused_otherwise(
    qwen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = ["--gpu-memory-gib", "96", "--gpu-tflops", "500", "--gpu-memory-gbps", "3000", "--gpu-link-gbps", "200"]
    assert main(["plan", "--model", qwen, "--gpus", "2xX9", *numbers]) == 0
    assert "X9 with 96.0 GiB" in capsys.readouterr().out
    assert main(["plan", "--model", qwen, "--gpus", "2xX9"]) == 2
    assert "'X9' is no kind of GPU" in capsys.readouterr().err
    assert main(["plan", "--model", qwen, "--gpus", "2", *numbers[:2]]) == 2
    assert "--gpu-tflops, --gpu-memory-gbps, --gpu-link-gbps is missing" in capsys.readouterr().err
    assert main(["plan", "--model", qwen, "--gpus", "2"]) == 0
    assert "no estimate of memory and time: the kind of GPU is not known" in capsys.readouterr().out


def test_a_layout_that_does_not_fit_is_refused_with_one_that_does(
    qwen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", qwen, "--gpus", "4xA10", "--trainer-processes", "1"]) == 2
    said = capsys.readouterr().err
    assert "a trainer GPU needs" in said and "What would fit: " in said
