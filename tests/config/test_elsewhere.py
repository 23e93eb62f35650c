"""Settings of engines elsewhere: TRL's server, URLs, Ray, and what would be ignored beside them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from shoal import GRPOConfig
from shoal.errors import ConfigError

URLS = ["http://10.0.0.7:8000", "http://[fd00::7]:8000"]


def config(tmp_path: Path, **settings: Any) -> GRPOConfig:
    return GRPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False} | settings)


def test_urls_are_kept_without_their_last_slash_and_no_engine_takes_devices_here(tmp_path: Path) -> None:
    args = config(tmp_path, vllm_server_base_urls=["http://10.0.0.7:8000/", URLS[1]])
    assert args.vllm_server_base_urls == URLS and args.engines_are_elsewhere
    assert not config(tmp_path).engines_are_elsewhere
    assert config(tmp_path, vllm_launcher="ray", vllm_num_engines=2).engines_are_elsewhere


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({"vllm_server_base_url": "http://gpu7:9000"}, "http://gpu7:9000"),
        ({"vllm_server_base_url": "http://gpu7:9000", "vllm_server_port": 1}, "http://gpu7:9000"),  # as in TRL
        ({"vllm_server_host": "gpu7"}, "http://gpu7:8000"),
        ({"vllm_server_port": 9000}, "http://0.0.0.0:9000"),
        ({"vllm_server_host": "fd00::7", "vllm_mode": "server"}, "http://[fd00::7]:8000"),
    ],
)
def test_the_one_server_of_a_script_from_trl_is_the_engine_to_attach_to(
    tmp_path: Path, settings: dict[str, Any], url: str
) -> None:
    with pytest.warns(UserWarning, match=r"vllm_server_base_urls=.*shoal serve"):
        args = config(tmp_path, **settings)
    assert args.vllm_server_base_urls == [url]
    # What a checkpoint keeps of it gives the same settings again, without a word.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = config(tmp_path, **settings, vllm_server_base_urls=[url])
    assert again.vllm_server_base_urls == [url]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_server_base_urls": []}, "is no list of URLs"),
        ({"vllm_server_base_urls": "http://a:1"}, "is no list of URLs"),
        ({"vllm_server_base_urls": ["10.0.0.7:8000"]}, "no server's URL"),
        ({"vllm_server_base_urls": ["http://a:1/v1"]}, "no server's URL"),
        ({"vllm_server_base_urls": ["http://a:1", "http://a:1/"]}, "twice"),
        ({"vllm_server_base_urls": URLS, "vllm_server_base_url": "http://b:1"}, "contradicts"),
        ({"vllm_server_base_urls": URLS, "vllm_mode": "colocate"}, "contradicts"),
        ({"vllm_server_base_urls": URLS, "vllm_num_engines": 3}, "contradicts the 2"),
        ({"vllm_server_base_urls": URLS, "vllm_launcher": "ray"}, "nothing to start"),
        ({"vllm_server_base_urls": URLS, "vllm_lora_sync": "adapter"}, "started with the adapter"),
        ({"vllm_server_base_urls": URLS, "vllm_tensor_parallel_size": 2}, "no effect.*shoal serve --tp"),
        ({"vllm_server_base_urls": URLS, "vllm_devices": "cpu"}, "no effect.*--devices"),
        ({"vllm_server_base_urls": URLS, "vllm_extra_args": {"max-num-seqs": 3}}, "no effect.*--extra-args"),
        ({"vllm_server_base_urls": URLS, "vllm_max_model_length": 2048}, "no effect.*--max-model-len"),
        ({"vllm_launcher": "kubernetes"}, "vllm_launcher='kubernetes' is not supported"),
        ({"vllm_launcher": "ray"}, "needs vllm_num_engines"),
        ({"vllm_launcher": "ray", "vllm_num_engines": 1, "vllm_devices": "cpu"}, "Ray chooses"),
        ({"vllm_launcher": "ray", "vllm_num_engines": 1, "vllm_base_port": 8000}, "Ray chooses"),
        ({"vllm_api_key_file": "key"}, "get a random key"),
        ({"vllm_launcher": "ray", "vllm_num_engines": 1, "vllm_api_key_file": "key"}, "get a random key"),
        ({"weight_sync_host": "10.0.0.1"}, "over loopback"),
    ],
)
def test_what_contradicts_or_would_be_ignored_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ConfigError, match=message):
            config(tmp_path, **settings)


def test_a_password_in_a_url_is_refused_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vllm_api_key_file") as refused:
        config(tmp_path, vllm_server_base_urls=["http://me:hunter2@a:1"])
    assert "hunter2" not in str(refused.value)


def test_no_setting_holds_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_ENGINE_API_KEY", "a-secret-key")
    args = config(tmp_path, vllm_server_base_urls=URLS)
    assert "a-secret-key" not in args.to_json_string() + repr(args)
