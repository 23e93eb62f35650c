"""From settings to what would be started, without starting it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoTokenizer

from shoal import GRPOConfig, GRPOTrainer, vllm_compat
from shoal.engines.ray_engine import RayLauncher
from shoal.errors import ConfigError
from shoal.testing import tiny_model, tiny_tokenizer
from shoal.trainer.factory import (
    _write_engine_model,
    draw_blueprint,
    make_decoder,
    plan_placement,
)
from shoal.types import Prompt, Rollout


def config(tmp_path: Path, **settings: Any) -> GRPOConfig:
    return GRPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False} | settings)


def rollout(text: str, *, ended: bool) -> Rollout:
    ids = [*tiny_tokenizer()(text).input_ids, *([2] if ended else [])]
    return Rollout(
        token_ids=np.array(ids, dtype=np.int32),
        rollout_logprobs=np.zeros(len(ids), np.float32),
        finish_reason="stop" if ended else "length",
        weight_version=0,
        engine="e",
    )


def test_completions_are_text_for_text_and_messages_for_conversations() -> None:
    decode = make_decoder(tiny_tokenizer())
    rollouts = (rollout("yes ü", ended=True), rollout("no", ended=False))
    text = Prompt(row=0, prompt="p", token_ids=(1,), columns={})
    conversation = Prompt(row=0, prompt=[{"role": "user", "content": "p"}], token_ids=(1,), columns={})
    assert decode(text, rollouts) == ("yes ü", "no")
    assert decode(conversation, rollouts) == (
        [{"role": "assistant", "content": "yes ü"}],
        [{"role": "assistant", "content": "no"}],
    )


def test_engines_are_told_what_the_settings_say(tmp_path: Path) -> None:
    args = config(
        tmp_path,
        vllm_devices="cpu",
        vllm_num_engines=1,
        vllm_extra_args={"enforce-eager": True},
        vllm_model_impl="transformers",
        trust_remote_code=True,
        seed=7,
    )
    model = tiny_model()
    blueprint = draw_blueprint(plan_placement(model.config, args), model=model, args=args, max_model_len=99)
    (spec,) = blueprint.specs
    assert blueprint.backends == ("gloo",)
    assert spec.model_dir == tmp_path / "engines" / "model"
    assert (spec.dtype, spec.max_model_len, spec.seed, spec.cuda_devices) == ("float32", 99, 7, ())
    assert (spec.tensor_parallel_size, spec.pipeline_parallel_size) == (1, 1)
    assert spec.extra_arguments == {"enforce-eager": True, "model-impl": "transformers", "trust-remote-code": True}
    assert not (tmp_path / "engines").exists()


def test_what_the_user_sets_goes_before_what_would_be_derived(tmp_path: Path) -> None:
    args = config(tmp_path, vllm_devices="cpu", vllm_num_engines=2, vllm_dtype="bfloat16", vllm_max_model_length=600)
    model = tiny_model()
    blueprint = draw_blueprint(plan_placement(model.config, args), model=model, args=args, max_model_len=99)
    assert [(spec.dtype, spec.max_model_len) for spec in blueprint.specs] == [("bfloat16", 600)] * 2
    assert len({spec.port for spec in blueprint.specs}) == len({spec.name for spec in blueprint.specs}) == 2


def test_engines_that_run_already_take_nothing_here_and_are_told_what_is_needed(tmp_path: Path) -> None:
    urls = ["http://10.0.0.7:8000", "http://10.0.0.8:8000"]
    args, model = config(tmp_path, vllm_server_base_urls=urls), tiny_model()
    plan = plan_placement(model.config, args)
    assert plan.engines == () and [device.label for device in plan.trainers] == ["cpu"]
    blueprint = draw_blueprint(plan, model=get_peft_model(model, LoraConfig()), args=args, max_model_len=99)
    assert blueprint.specs == () and blueprint.backends == ("gloo", "gloo")
    assert blueprint.needs is not None
    assert (blueprint.needs.max_model_len, blueprint.needs.device) == (99, "cpu")
    assert blueprint.needs.model["hidden_size"] == model.config.hidden_size


def test_engines_on_ray_leave_their_devices_and_ports_to_the_nodes(tmp_path: Path) -> None:
    args = config(tmp_path, vllm_launcher="ray", vllm_num_engines=3, vllm_tensor_parallel_size=2)
    model = tiny_model()
    plan = plan_placement(model.config, args)
    assert plan.engines == ()
    blueprint = draw_blueprint(plan, model=model, args=args, max_model_len=99)
    assert [spec.name for spec in blueprint.specs] == ["engine-0", "engine-1", "engine-2"]
    assert {(spec.port, spec.num_workers, spec.cuda_devices, spec.cpu_cores) for spec in blueprint.specs} == {
        (0, 2, (), ())
    }
    assert blueprint.backends == ("gloo",) * 3 and isinstance(blueprint.launch, RayLauncher)


@pytest.mark.parametrize(
    ("version", "said"), [("0.32.0", ""), ("0.99.0", "vLLM 0.99.0 has not been tried with Shoal"), (None, None)]
)
def test_a_missing_vllm_is_refused_and_an_untried_one_is_told_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: str | None,
    said: str | None,
) -> None:
    args, model = config(tmp_path, vllm_devices="cpu", vllm_num_engines=1), tiny_model()
    plan = plan_placement(model.config, args)
    monkeypatch.setattr(vllm_compat, "installed_version", lambda: version)
    with caplog.at_level(logging.WARNING, logger="shoal"):
        if said is None:
            with pytest.raises(ConfigError, match=r"vLLM is not installed\. Run: pip install vllm"):
                draw_blueprint(plan, model=model, args=args, max_model_len=9)
            return
        draw_blueprint(plan, model=model, args=args, max_model_len=9)
    assert said in caplog.text and bool(caplog.text) == bool(said)


def test_an_engine_finds_the_models_configuration_and_tokenizer_but_no_weights(tmp_path: Path) -> None:
    folder = tmp_path / "engines" / "model"
    model = tiny_model()
    assert model.config.architectures is None
    _write_engine_model(folder, model, tiny_tokenizer())
    config = AutoConfig.from_pretrained(folder)
    assert (config.hidden_size, config.architectures) == (64, ["LlamaForCausalLM"])
    assert AutoTokenizer.from_pretrained(folder)("ab").input_ids == tiny_tokenizer()("ab").input_ids
    assert not list(folder.glob("*.safetensors")) and (folder / "generation_config.json").exists()


def test_an_adapters_engine_gets_the_configuration_of_the_model_below(tmp_path: Path) -> None:
    _write_engine_model(tmp_path, get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM")), tiny_tokenizer())
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"


@pytest.mark.parametrize(("kind", "message"), [({"lora_bias": True}, "no place for it"), ({}, None)])
def test_an_adapter_that_cannot_be_sent_is_refused_before_an_engine_starts(
    make_trainer: Callable[..., Any], kind: dict[str, Any], message: str | None
) -> None:
    started: list[str] = []

    class Starting(GRPOTrainer):
        def _start_rollouts(self) -> Any:
            started.append("start")
            raise RuntimeError("not in this test")

    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **kind)
    trainer = make_trainer(kind=Starting, peft_config=adapter)
    with pytest.raises(ConfigError if message else RuntimeError, match=message or "not in this test"):
        trainer.train()
    assert started == ([] if message else ["start"])  # the control: one that can be sent gets as far
