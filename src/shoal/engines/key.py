"""The key of engines that are started apart from their trainer: from a file or the environment, never from a setting.

Settings are saved in checkpoints and shown in logs and process lists.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from shoal.errors import ConfigError
from shoal.vllm_plugin.gate import KEY_VARIABLE

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_HOW_TO_MAKE = "Make one with: (umask 077; openssl rand -hex 32 > shoal.key)"


def read_key(key_file: str | os.PathLike[str] | None, environment: Mapping[str, str]) -> str | None:
    """Return the key; None where none is given.

    Args:
        key_file: Holds the key and nothing else; None to look in the environment.
        environment: May have it under `SHOAL_ENGINE_API_KEY`.

    Raises:
        ConfigError: The file cannot be read, holds no key, or can be read by others than its owner.
    """
    if key_file is None:
        return environment.get(KEY_VARIABLE, "").strip() or None
    path = Path(key_file)
    try:
        mode = path.stat().st_mode
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The key file {str(path)!r} cannot be read: {error}. {_HOW_TO_MAKE}") from None
    if mode & _OTHERS:
        raise ConfigError(
            f"The key file {str(path)!r} can be read by others than its owner (mode {stat.S_IMODE(mode):o}), and "
            f"whoever has the key controls the engines. Run: chmod 600 {path}"
        )
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"The key file {str(path)!r} holds no key: one line of printable ASCII. {_HOW_TO_MAKE}")
    return key


def need_key(key_file: str | os.PathLike[str] | None, environment: Mapping[str, str]) -> str:
    """Return the key.

    Raises:
        ConfigError: There is none; see `read_key` too.
    """
    key = read_key(key_file, environment)
    if key is None:
        raise ConfigError(
            f"No key is given, and an engine without one would be open to everybody on the network. Set "
            f"{KEY_VARIABLE}, or name a file that holds it. {_HOW_TO_MAKE}"
        )
    return key
