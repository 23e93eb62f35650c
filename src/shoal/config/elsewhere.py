"""Settings of engines that do not start on this host: their translation from TRL's, and their rules."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.config.grpo_config import GRPOConfig

TRL_SERVER_HOST = "0.0.0.0"
TRL_SERVER_PORT = 8000

# What decides how engines are started, the value that leaves it open, and the flag of `shoal serve` instead.
_STARTING: dict[str, tuple[object, str]] = {
    "vllm_devices": ("auto", "--devices"),
    "vllm_tensor_parallel_size": (1, "--tp"),
    "vllm_pipeline_parallel_size": (1, "--pp"),
    "vllm_gpu_memory_utilization": (None, "--gpu-memory-utilization"),
    "vllm_max_model_length": (None, "--max-model-len"),
    "vllm_dtype": (None, "--dtype"),
    "vllm_model_impl": ("vllm", "--extra-args"),
    "vllm_base_port": (None, "--port"),
    "vllm_extra_args": (None, "--extra-args"),
}


def translate_trl_server(config: GRPOConfig) -> None:
    """Take TRL's one server, given by its URL or by host and port, as the one engine to attach to.

    Raises:
        ConfigError: It contradicts `vllm_server_base_urls`.
    """
    host, port = config.vllm_server_host, config.vllm_server_port
    url = config.vllm_server_base_url  # in TRL it goes before host and port
    name = "vllm_server_base_url"
    if url is None and (host, port) != (TRL_SERVER_HOST, TRL_SERVER_PORT):
        url, name = f"http://{f'[{host}]' if ':' in host else host}:{port}", "vllm_server_host and vllm_server_port"
    if url is None:
        return
    if config.vllm_server_base_urls not in (None, [url]):
        raise ConfigError(
            f"{name} ({url}) contradicts vllm_server_base_urls={config.vllm_server_base_urls!r}: both say what to "
            "attach to. Remove the first, which is TRL's name for one."
        )
    if config.vllm_server_base_urls is None:
        config.vllm_server_base_urls = [url]
        warnings.warn(
            f"{name} is vllm_server_base_urls=[{url!r}] here: a vLLM server started with `shoal serve`, not TRL's own.",
            UserWarning,
            stacklevel=4,
        )


def attached_engines_are_made_elsewhere(config: GRPOConfig) -> None:
    """Refuse URLs that are none, and settings that decide how engines are started beside engines that run already."""
    urls = config.vllm_server_base_urls
    if urls is None:
        return
    if not isinstance(urls, list) or not urls or not all(isinstance(url, str) for url in urls):
        raise ConfigError(
            f'vllm_server_base_urls={urls!r} is no list of URLs. Write ["http://HOST:PORT", ...], or unset it to have '
            "engines started."
        )
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ConfigError(f"vllm_server_base_urls has {url!r}, which is no server's URL. Write http://HOST:PORT.")
        if parts.username is not None or parts.password is not None:
            raise ConfigError(
                "vllm_server_base_urls has a URL with a password in it, which would be saved in checkpoints and logs. "
                "Put the key into a file and name that in vllm_api_key_file."
            )
    config.vllm_server_base_urls = [url.rstrip("/") for url in urls]
    if len(set(config.vllm_server_base_urls)) < len(urls):
        raise ConfigError(f"vllm_server_base_urls={urls!r} names an engine twice. Name each once.")
    for name, (unset, flag) in _STARTING.items():
        value = getattr(config, name)
        if value != unset:
            raise ConfigError(
                f"{name}={value!r} has no effect on engines that run already (vllm_server_base_urls). Remove it; "
                f"`shoal serve {flag}` decides it."
            )
    if config.vllm_num_engines not in (None, len(urls)):
        raise ConfigError(
            f"vllm_num_engines={config.vllm_num_engines} contradicts the {len(urls)} vllm_server_base_urls. Remove it."
        )
    if config.vllm_launcher != "local":
        raise ConfigError(
            f"vllm_launcher={config.vllm_launcher!r} has nothing to start beside vllm_server_base_urls. Remove one."
        )
    if config.vllm_lora_sync == "adapter":
        raise ConfigError(
            'vllm_lora_sync="adapter" needs engines that are started with the adapter, and attached ones are not. '
            "Remove it, to send the merged weights."
        )


def ray_decides_where(config: GRPOConfig) -> None:
    """Refuse settings that name devices or ports of this host beside a launcher that uses others."""
    if config.vllm_launcher != "ray":
        return
    if config.vllm_num_engines is None:
        raise ConfigError(
            'vllm_launcher="ray" needs vllm_num_engines: how many of a cluster\'s devices are meant for this run is '
            "not known. Set it."
        )
    for name, unset in (("vllm_devices", "auto"), ("vllm_base_port", None)):
        value = getattr(config, name)
        if value != unset:
            raise ConfigError(f'{name}={value!r} has no effect with vllm_launcher="ray": Ray chooses. Remove it.')


def settings_for_elsewhere_are_used(config: GRPOConfig) -> None:
    """Refuse settings that matter for engines elsewhere only, where there are none, or the other way round."""
    if config.weight_sync_backend == "ipc" and config.engines_are_elsewhere:
        raise ConfigError(
            'weight_sync_backend="ipc" has engines open the trainer\'s memory, and these are not started on this host. '
            "Remove it: their weights go over NCCL."
        )
    if config.vllm_api_key_file is not None and config.vllm_server_base_urls is None:
        raise ConfigError(
            f"vllm_api_key_file={config.vllm_api_key_file!r} has no effect: engines that Shoal starts get a random "
            "key. Remove it, or set vllm_server_base_urls."
        )
    if config.weight_sync_host is not None and not config.engines_are_elsewhere:
        raise ConfigError(
            f"weight_sync_host={config.weight_sync_host!r} has no effect: the engines are on this host and are reached "
            "over loopback. Remove it."
        )
