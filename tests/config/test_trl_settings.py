"""Scripts written for TRL 1.16 run with Shoal's config, and nothing of theirs is silently ignored."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from shoal.config import GRPOConfig
from shoal.config.trl_only import TrlOnlyFields
from shoal.errors import ConfigError

# Taken from TRL 1.16's `GRPOConfig`: every field that it adds to or changes in `TrainingArguments`.
TRL_DEFAULTS: dict[str, Any] = json.loads((Path(__file__).parent / "trl_1_16_defaults.json").read_text())

# Where a setting means the same but Shoal's default has to differ, and why.
OTHER_DEFAULTS = {
    "use_vllm": None,  # TRL's False means "generate with transformers", which Shoal cannot.
    "vllm_mode": None,  # The devices say it: `vllm_devices`.
    "vllm_gpu_memory_utilization": None,  # Depends on whether a trainer shares the GPU.
    "vllm_enable_sleep_mode": None,  # The same: an engine that shares its GPU sleeps.
}


def config(**settings: Any) -> GRPOConfig:
    return GRPOConfig(output_dir="unused", report_to="none", **settings)


def other_than(value: object) -> object:
    """A value of the same kind that is not `value`."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else 0.5 if value is None else f"{value}-not"


def test_every_setting_of_trl_exists_with_the_default_of_trl() -> None:
    ours = {declared.name: declared.default for declared in fields(GRPOConfig)}
    assert {name: ours[name] for name in TRL_DEFAULTS} == TRL_DEFAULTS | OTHER_DEFAULTS


def test_every_setting_of_trl_may_be_written_out_at_its_default() -> None:
    written = {name: value for name, value in TRL_DEFAULTS.items() if name not in ("use_vllm", "vllm_mode")}
    assert config(**written).vllm_gpu_memory_utilization == 0.3


@pytest.mark.parametrize("name", [declared.name for declared in fields(TrlOnlyFields)])
def test_a_setting_that_shoal_lacks_is_refused_by_name_once_it_is_changed(name: str) -> None:
    value = other_than(TRL_DEFAULTS[name])
    with pytest.raises(ConfigError, match=f"{name}="):
        config(**{name: value})


def test_other_filters_and_penalties_are_refused_because_the_logprobs_would_not_match() -> None:
    with pytest.raises(ConfigError, match="another distribution"):
        config(repetition_penalty=1.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 0.0), ("top_p", 1.1), ("top_k", 1), ("top_k", -2), ("min_p", -0.1), ("min_p", 1.0)],
)
def test_sampling_filters_that_leave_nothing_to_choose_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}="):
        config(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.9), ("top_k", 20), ("min_p", 0.05)])
def test_sampling_filters_are_taken(name: str, value: float) -> None:
    assert getattr(config(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [("top_k", -1), ("min_p", 0.0), ("generation_kwargs", {})])
def test_other_ways_to_write_a_default_are_accepted(name: str, value: object) -> None:
    assert getattr(config(**{name: value}), name) == value


def test_use_vllm_may_be_set_but_not_unset() -> None:
    assert config(use_vllm=True).use_vllm is True
    with pytest.raises(ConfigError, match="always generates with vLLM engines"):
        config(use_vllm=False)


def test_the_mode_colocate_becomes_the_device_setting_with_a_warning() -> None:
    with pytest.warns(UserWarning, match='vllm_devices="colocate"'):
        assert config(vllm_mode="colocate").vllm_devices == "colocate"


def test_the_mode_server_becomes_automatic_devices_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="Shoal starts engines itself"):
        assert config(vllm_mode="server").vllm_devices == "auto"


@pytest.mark.parametrize(("mode", "devices"), [("colocate", "cuda:1"), ("server", "colocate"), ("remote", "auto")])
def test_a_mode_that_contradicts_the_devices_is_refused(mode: str, devices: str) -> None:
    with pytest.raises(ConfigError, match="vllm_mode"):
        config(vllm_mode=mode, vllm_devices=devices)


@pytest.mark.parametrize(("written", "meant"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_scale_rewards_takes_booleans_as_in_trl(written: Any, meant: str) -> None:
    assert config(scale_rewards=written).scale_rewards == meant
