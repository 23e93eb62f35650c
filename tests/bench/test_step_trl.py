"""TRL's half of the step benchmark, with stand-ins for what TRL and vLLM do."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.bench.step_child import StepTimes
from shoal.bench.step_run import StepRun
from shoal.bench.step_settings import StepSettings
from shoal.bench.step_trl import timed_trainer_class, trl_arguments
from shoal.bench.step_trl_server import server_command, why_not_trl

CUDA = StepSettings(model_shape="qwen3-1.4b", device="cuda", steps=2, warmup_steps=1, num_prompts=2, num_generations=2)
RAGGED = replace(CUDA, is_ragged=True, completion_tokens=1024)
RUN = StepRun(parts=(CUDA,))
BOTH = StepRun(parts=(CUDA, RAGGED))


class _Client:
    """Answers as TRL's client of a server does."""

    def generate(self, prompts: list[list[int]], *, n: int, max_tokens: int, **_: Any) -> dict[str, Any]:
        number = len(prompts) * n
        return {"completion_ids": [[7] * max_tokens] * number, "logprobs": [[[-1.0]] * max_tokens] * number}


class _Generation:
    """TRL's generation, as far as it decides about lengths."""

    mode = "server"

    def __init__(self) -> None:
        self.max_completion_length = 0
        self.vllm_client = _Client()
        self.num_syncs = 0

    def sync_weights(self) -> None:
        self.num_syncs += 1


class _Trainer:
    """TRL's trainer, as far as it generates: it reads what says how just then."""

    use_vllm = True

    def __init__(self) -> None:
        self.vllm_generation = _Generation()
        self.max_completion_length = 0
        self.rollout_func: Any = None
        self.state = SimpleNamespace(global_step=0)
        self._last_loaded_step = -1
        self.accelerator = SimpleNamespace(process_index=0, num_processes=1)

    def processing_class(self, prompts: list[str], **_: Any) -> dict[str, Any]:
        return {"input_ids": [[1] * len(prompt) for prompt in prompts]}

    def _generate(self, prompts: list[str]) -> tuple[Any, Any]:
        if self.rollout_func is not None:
            found = self.rollout_func(prompts, self)
            return found["prompt_ids"], found["completion_ids"]
        ids = self.processing_class(prompts)["input_ids"]
        most = self.vllm_generation.max_completion_length
        found = self.vllm_generation.vllm_client.generate(ids, n=1, max_tokens=most)
        return ids, found["completion_ids"]


@pytest.mark.parametrize("run", [BOTH, RUN, StepRun(parts=(RAGGED,))], ids=["both", "fixed", "ragged"])
def test_each_part_is_generated_as_if_it_were_alone(run: StepRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(GRPOTrainer=_Trainer))
    trainer: Any = timed_trainer_class()()
    trainer.bench, trainer.times = run, StepTimes()
    expected = [(part, part.lengths(step)) for part in run.parts for step in range(3)]
    for step, (part, lengths) in enumerate(expected):
        trainer.state.global_step = step
        _, completion_ids = trainer._generate(["ab", "ab", "cd", "cd"])
        assert [len(ids) for ids in completion_ids] == lengths
        assert (trainer.rollout_func is not None) is part.is_ragged
        assert trainer.max_completion_length == part.completion_tokens
    assert trainer.times.tokens == [sum(lengths) for _, lengths in expected]
    assert trainer.vllm_generation.num_syncs == run.num_steps == len(trainer.times.phases["generate"])


def test_both_trainers_train_on_the_same_completions_of_a_step() -> None:
    settings = replace(CUDA, num_prompts=32, num_generations=8, num_ranks=2, layout="colocated", num_engines=2)
    theirs = trl_arguments(StepRun(parts=(settings,)), Path("run"), "")
    assert theirs["per_device_train_batch_size"] * theirs["gradient_accumulation_steps"] * 2 == settings.num_completions
    assert theirs["vllm_mode"] == "colocate" and theirs["generation_kwargs"] == {"ignore_eos": True}
    served = trl_arguments(RUN, Path("run"), "http://127.0.0.1:1")
    assert served["vllm_mode"] == "server" and served["vllm_server_base_url"] == "http://127.0.0.1:1"
    command = server_command(StepRun(parts=(replace(CUDA, tensor_parallel_size=2),)), Path("model"), 1)
    assert command[command.index("--tensor_parallel_size") + 1] == "2"
    on_cpus = StepRun(parts=(replace(CUDA, device="cpu", completion_tokens=20),))
    assert trl_arguments(on_cpus, Path("run"), "")["generation_kwargs"] == {"min_new_tokens": 20}


def test_engines_have_room_for_the_longest_completion_of_all_parts() -> None:
    assert trl_arguments(BOTH, Path("run"), "")["vllm_max_model_length"] == 64 + 1024
    assert trl_arguments(RUN, Path("run"), "")["vllm_max_model_length"] == 64 + 510
    command = server_command(BOTH, Path("model"), 1)
    assert command[command.index("--max_model_len") + 1] == str(64 + 1024)


def test_trl_is_left_out_with_the_reason_where_it_cannot_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_not_trl(CUDA) == "TRL is not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert why_not_trl(CUDA) is None
    assert "no" in str(why_not_trl(replace(RAGGED, device="cpu")))
    assert "one server" in str(why_not_trl(replace(CUDA, num_engines=2)))
    assert "all ranks" in str(why_not_trl(replace(CUDA, layout="colocated", num_ranks=2)))
