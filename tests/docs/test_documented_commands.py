"""What README and docs tell a newcomer to type is typed here."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.testing import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "tutorial.md", ROOT / "docs" / "sharding.md")
BIN = Path(sys.executable).parent


def _commands(page: Path) -> list[str]:
    """Return the commands of a page's indented and fenced blocks, comments cut off."""
    lines = [line.strip() for line in page.read_text().splitlines() if line.startswith("    ")]
    return [line.split("   #")[0].strip() for line in lines]


def _python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_documented_plan_command_prints_a_plan(page: Path) -> None:
    for command in _commands(page):
        if command.startswith(".venv/bin/shoal plan"):
            words = shlex.split(command)
            done = subprocess.run([BIN / "shoal", *words[1:]], capture_output=True, text=True, timeout=60, cwd=ROOT)
            assert done.returncode == 0, done.stderr
            assert "engine-0" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_documented_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)\b(?=`|\s{2,}|$)", page.read_text(), flags=re.MULTILINE))
    assert named <= targets, f"{page.name} names {named - targets}"


def test_the_readmes_example_builds_a_trainer(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    (example,) = _python_blocks(ROOT / "README.md")
    script = tmp_path / "train.py"
    # A model that is there, a dataset without the ellipsis but large enough, and no training.
    script.write_text(
        example.replace('"path-or-id"', repr(str(model)))
        .replace('[{"prompt": "2 + 2 =", "answer": "4"}, ...]', '[{"prompt": "2 + 2 =", "answer": "4"}] * 8')
        .replace("max_completion_length=64", "max_completion_length=64, report_to='none', use_cpu=True")
        .replace("trainer.train()", "assert trainer.rollouts is None")
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_the_tutorial_trains_and_reports(tmp_path: Path) -> None:
    (script,) = _python_blocks(ROOT / "docs" / "tutorial.md")
    assert "max_steps=3," in script
    (tmp_path / "train.py").write_text(script.replace("max_steps=3,", "max_steps=2,"))  # each takes half a minute
    for command in ([sys.executable, "train.py"], [BIN / "shoal", "report", "runs/tutorial"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=800, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "tutorial"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 2
    assert (run / "model" / "model.safetensors").exists()
    assert "<svg" in (run / "report.html").read_text()


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_the_demo_leaves_everything_that_it_promises(tmp_path: Path) -> None:
    """On one core, so with one engine; the tutorial has one for each core."""
    done = subprocess.run(
        [BIN / "shoal", "demo", "--steps", "1", "--held-out", "4", "--output-dir", tmp_path / "demo"],
        capture_output=True,
        text=True,
        timeout=800,
        cwd=tmp_path,
        preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["num_steps"] == summary["num_engines"] == 1
    assert summary["num_publishes"] == summary["num_publishes_proven"] > summary["num_steps"]
    assert {"reward_before", "reward_after", "reward_ci95", "num_engines", "seconds", "versions"} <= summary.keys()
    assert len(list((tmp_path / "demo" / "completions").glob("*.parquet"))) == 1
    assert (tmp_path / "demo" / "model" / "config.json").exists()
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    for index in range(summary["num_engines"]):
        assert (tmp_path / "demo" / "engines" / f"engine-{index}.log").stat().st_size > 0
