"""Bring settings into one form before they are checked: JSON text to mappings, TRL's other spellings to ours."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING

from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.config.grpo_config import GRPOConfig

_JSON_SETTINGS = ("model_init_kwargs", "chat_template_kwargs", "vllm_extra_args")
_SCALE_REWARDS = {True: "group", False: "none", "True": "group", "False": "none"}


def parse_json_settings(config: GRPOConfig) -> None:
    """Replace settings that a command line gives as JSON text by the mappings they stand for.

    Raises:
        ConfigError: The text is not a JSON object, or the value is not a mapping.
    """
    for name in _JSON_SETTINGS:
        value = getattr(config, name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ConfigError(
                    f"{name}={value!r} is not JSON ({error}), so it cannot be read as a mapping. "
                    f'Write an object, such as {name}=\'{{"key": "value"}}\'.'
                ) from None
            setattr(config, name, value)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{name}={value!r} is not a mapping of names to values. Give a dict or a JSON object.")


def translate_trl_values(config: GRPOConfig) -> None:
    """Translate values that TRL accepts: booleans of `scale_rewards`, and `vllm_mode`.

    Raises:
        ConfigError: `vllm_mode` is unknown, or contradicts `vllm_devices`.
    """
    config.scale_rewards = _SCALE_REWARDS.get(config.scale_rewards, config.scale_rewards)
    mode, devices = config.vllm_mode, config.vllm_devices
    if mode is None:
        return
    if mode not in ("server", "colocate"):
        raise ConfigError(f"vllm_mode={mode!r} is not known. Remove it and set vllm_devices instead.")
    if mode == "colocate" and config.vllm_server_base_urls:
        raise ConfigError(
            f"vllm_mode='colocate' contradicts vllm_server_base_urls={config.vllm_server_base_urls!r}: engines that "
            "run already are on devices of their own. Remove one of them."
        )
    fitting = ("auto", "colocate") if mode == "colocate" else None
    if (fitting is not None and devices not in fitting) or (mode == "server" and devices == "colocate"):
        raise ConfigError(
            f"vllm_mode={mode!r} contradicts vllm_devices={devices!r}: both say where engines run. Remove vllm_mode."
        )
    if mode == "colocate":
        config.vllm_devices = "colocate"
        meaning = 'is vllm_devices="colocate" here: engines are processes of their own on the trainer\'s GPUs'
    elif config.vllm_server_base_urls:
        return
    else:
        meaning = "does not look for a server: Shoal starts engines itself, on the GPUs that vllm_devices says"
    warnings.warn(f"vllm_mode={mode!r} {meaning}. Set vllm_devices instead.", UserWarning, stacklevel=4)
