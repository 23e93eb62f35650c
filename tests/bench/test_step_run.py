"""The parts of one start: which step belongs where, what the arguments come to, and where results go."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.bench.step_report import result_paths
from shoal.bench.step_run import StepRun, trainer_arguments
from shoal.bench.step_settings import StepSettings, check_step
from shoal.cli.bench_step import add_step_arguments, step_run
from shoal.errors import ConfigError

FIXED = StepSettings(model_shape="qwen3-1.4b", device="cuda", steps=3, warmup_steps=2)
RAGGED = replace(FIXED, is_ragged=True, completion_tokens=1024)
BOTH = StepRun(parts=(FIXED, RAGGED))


def _parsed(words: str) -> StepRun:
    parser = argparse.ArgumentParser()
    add_step_arguments(parser)
    return step_run(parser.parse_args(["--device", "cuda", "--model-shape", "1.4b", *words.split()]))


def test_a_parts_lengths_are_the_same_after_another_part_as_alone() -> None:
    alone = StepRun(parts=(RAGGED,))
    assert [BOTH.place(5 + step).lengths for step in range(5)] == [alone.place(step).lengths for step in range(5)]
    assert BOTH.place(5).lengths != BOTH.place(6).lengths
    assert [BOTH.place(step).part for step in (0, 4, 5, 9)] == [FIXED, FIXED, RAGGED, RAGGED]
    assert BOTH.place(4).lengths == [510] * 256


def test_trainers_are_started_for_all_steps_and_for_the_longest_completion() -> None:
    arguments = trainer_arguments(BOTH, Path("run"))
    assert (arguments["max_steps"], arguments["max_completion_length"]) == (10, 1024)
    assert StepRun.from_json(BOTH.to_json()) == BOTH


def test_each_choice_of_lengths_has_its_parts_and_its_longest_completion() -> None:
    assert _parsed("--steps 3 --lengths both") == BOTH
    assert _parsed("--steps 3") == StepRun(parts=(FIXED,))
    assert _parsed("--steps 3 --lengths ragged") == StepRun(parts=(RAGGED,))
    some = _parsed("--lengths both --tokens 20 --ragged-tokens 30")
    assert [part.completion_tokens for part in some.parts] == [20, 30]


@pytest.mark.parametrize("words", ["--ragged-tokens 30", "--lengths ragged --tokens 20"])
def test_an_option_about_lengths_that_are_not_measured_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="Leave it out"):
        _parsed(words)


def test_what_does_not_fit_a_small_model_is_refused_with_the_option_that_says_so() -> None:
    with pytest.raises(ConfigError, match=r"1024 tokens \(ragged lengths, --ragged-tokens\) do not fit into the 512"):
        check_step(replace(RAGGED, model_shape="tiny"), 2)


def test_each_part_has_a_file_of_its_own_with_the_name_that_it_has_alone() -> None:
    names = [path.name for path in result_paths(BOTH, None)]
    assert names == [f"step-qwen3-1.4b-{kind}-dedicated-1-to-1xtp1-cuda.json" for kind in ("fixed", "ragged")]
    assert result_paths(StepRun(parts=(RAGGED,)), None) == result_paths(BOTH, None)[1:]
    assert result_paths(StepRun(parts=(RAGGED,)), Path("out/a.json")) == [Path("out/a.json")]
    assert result_paths(BOTH, Path("out/a.json")) == [Path("out/a-fixed.json"), Path("out/a-ragged.json")]
