"""A run written down: the YAML or JSON of `shoal train`, whose keys are `GRPOTrainer`'s arguments and `GRPOConfig`'s.

Nothing is loaded here: what the file says is read and checked, so that a slip is told before a model is downloaded.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from shoal.config import GRPOConfig
from shoal.errors import ConfigError

_ARGUMENTS = ("model", "train_dataset", "eval_dataset", "reward_funcs", "peft_config")
_DATASET_KEYS = ("path", "name", "split", "data_files")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """Where a dataset comes from.

    Attributes:
        path: A .json, .jsonl, .parquet or .csv file, or the id of a dataset on the hub.
        name: Of one of the hub dataset's configurations.
        split: Of it, slices such as `"train[:1000]"` included.
        data_files: Of the hub dataset, if not all.
    """

    path: str
    name: str | None = None
    split: str = "train"
    data_files: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """Which reward function.

    Attributes:
        target: `"module:function"`, `"file.py:function"`, or the name of one of `shoal.rewards`.
        arguments: What it is called with to make the reward function; None where it is the reward function.
    """

    target: str
    arguments: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """What a file says.

    Attributes:
        model: A folder or a hub id.
        train_dataset: To train on.
        eval_dataset: To evaluate on; None for no evaluation.
        rewards: One or several.
        peft_config: Fields of `peft.LoraConfig`; None to train all weights.
        settings: Fields of `GRPOConfig`.
    """

    model: str
    train_dataset: DatasetSpec
    eval_dataset: DatasetSpec | None
    rewards: tuple[RewardSpec, ...]
    peft_config: Mapping[str, Any] | None
    settings: Mapping[str, Any]


def read_run_file(path: Path) -> RunFile:
    """Read a file, `.json` as JSON and any other as YAML.

    Raises:
        ConfigError: It cannot be read, or says something that is not known.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). Give the path of a YAML or JSON file.") from None
    try:
        content = (
            json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else yaml.load(text, _StrictLoader)
        )
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not valid: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no mapping of settings. Write `model: ...`, `train_dataset: ...` and so on.")
    return parse_run(content, str(path))


def parse_run(content: Mapping[str, Any], where: str) -> RunFile:
    """Check what a file says.

    Args:
        content: Its keys and values.
        where: Its name, for messages.

    Raises:
        ConfigError: A key is unknown or missing, or a value is of the wrong kind.
    """
    settings_known = {declared.name for declared in fields(GRPOConfig) if declared.init}
    refuse_unknown(content, {*_ARGUMENTS, *settings_known}, where)
    for needed in ("model", "train_dataset", "reward_funcs"):
        if content.get(needed) in (None, "", []):
            raise ConfigError(f"{where} has no {needed}. Add it: what is trained, on what, and by which rewards.")
    peft = content.get("peft_config")
    if peft is not None and not isinstance(peft, Mapping):
        raise ConfigError(
            f"{where}: peft_config={peft!r} is not a mapping. Write fields of LoraConfig, such as `r: 16`."
        )
    return RunFile(
        model=_text(content["model"], f"{where}: model"),
        train_dataset=_dataset(content["train_dataset"], f"{where}: train_dataset"),
        eval_dataset=_dataset(content["eval_dataset"], f"{where}: eval_dataset")
        if content.get("eval_dataset")
        else None,
        rewards=_rewards(content["reward_funcs"], where),
        peft_config=peft,
        settings={name: value for name, value in content.items() if name not in _ARGUMENTS},
    )


def refuse_unknown(given: Collection[Any], known: Collection[str], where: str) -> None:
    """Refuse names that are not known.

    Raises:
        ConfigError: The message says which, and the nearest that is.
    """
    for name in given:
        if name in known:
            continue
        near = difflib.get_close_matches(str(name), known, n=1)
        advice = f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(sorted(known)[:12])}, ..."
        raise ConfigError(f"{where}: {name!r} is not a setting, so it would be ignored. {advice}")


def _dataset(value: Any, where: str) -> DatasetSpec:
    if isinstance(value, str):
        return DatasetSpec(path=value)
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{where}={value!r} is no dataset. Give a file, a hub id, or a mapping with `path` and `split`."
        )
    refuse_unknown(value, _DATASET_KEYS, where)
    if not value.get("path"):
        raise ConfigError(f"{where} has no path. Give a file or a hub id.")
    return DatasetSpec(
        path=_text(value["path"], f"{where}: path"),
        name=value.get("name"),
        split=_text(value.get("split", "train"), f"{where}: split"),
        data_files=value.get("data_files"),
    )


def _rewards(value: Any, where: str) -> tuple[RewardSpec, ...]:
    return tuple(_reward(item, where) for item in (value if isinstance(value, list) else [value]))


def _reward(item: Any, where: str) -> RewardSpec:
    if isinstance(item, str):
        return RewardSpec(target=item)
    if isinstance(item, Mapping) and len(item) == 1:
        ((target, arguments),) = item.items()
        if isinstance(target, str) and isinstance(arguments, Mapping):
            return RewardSpec(target=target, arguments=arguments)
    raise ConfigError(
        f"{where}: reward_funcs has {item!r}. Give `module:function`, `file.py:function`, the name of a reward in "
        "shoal.rewards, or one such name with the arguments that make a reward of it."
    )


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}={value!r} is no text. Write it in quotes.")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is there twice: one of the values would be ignored."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


class _StrictLoader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader, which takes the last of two equal keys; this one refuses them."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Make a dict of a node."""
        pairs = [(self.construct_object(key, deep=True), None) for key, _ in node.value]
        _once(pairs)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping
