"""Where the key of engines elsewhere comes from, and what is no place for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.engines.key import need_key, read_key
from shoal.errors import ConfigError


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.touch(mode=mode)
    path.chmod(mode)
    path.write_text(text)
    return path


def test_the_file_goes_before_the_environment_and_spaces_around_the_key_do_not_count(tmp_path: Path) -> None:
    environment = {"SHOAL_ENGINE_API_KEY": " from-the-environment\n"}
    assert read_key(write(tmp_path / "key", "  from-the-file\n"), environment) == "from-the-file"
    assert read_key(None, environment) == "from-the-environment"
    assert read_key(None, {}) is None and read_key(None, {"SHOAL_ENGINE_API_KEY": ""}) is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_a_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "key", "secret", mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:o}.*chmod 600") as refused:
        read_key(path, {})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "\n", "two words", "a\nb", "schlüssel"])
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="holds no key"):
        read_key(write(tmp_path / "key", text), {})


def test_a_missing_file_and_a_missing_key_say_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read.*openssl rand"):
        need_key(tmp_path / "nowhere", {})
    with pytest.raises(ConfigError, match=r"open to everybody.*SHOAL_ENGINE_API_KEY.*openssl rand"):
        need_key(None, {})
