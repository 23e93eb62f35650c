"""From what a run's file says to what `GRPOTrainer` takes: dataset, reward functions, adapter."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from shoal import rewards
from shoal.config import GRPOConfig
from shoal.errors import ConfigError, DatasetError
from shoal.trainer.grpo_trainer import GRPOTrainer
from shoal.trainer.run_file import DatasetSpec, RewardSpec, RunFile, refuse_unknown

_FILE_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_KNOWN_REWARDS = ("accuracy_reward", "think_format_reward")
_KNOWN_MAKERS = ("get_soft_overlong_punishment",)


def make_trainer(run: RunFile) -> GRPOTrainer:
    """Return the trainer that a file describes. It checks everything and starts nothing.

    Raises:
        ShoalError: Something cannot work.
    """
    reward_funcs = [load_reward(spec) for spec in run.rewards]
    peft_config = None if run.peft_config is None else make_peft_config(run.peft_config)
    return GRPOTrainer(
        model=run.model,
        reward_funcs=reward_funcs,
        args=GRPOConfig(**run.settings),
        train_dataset=load_split(run.train_dataset),
        eval_dataset=None if run.eval_dataset is None else load_split(run.eval_dataset),
        peft_config=peft_config,
    )


def load_split(spec: DatasetSpec) -> Any:
    """Load a dataset's split, from a file or from the hub.

    Raises:
        DatasetError: There is none, or it cannot be read.
    """
    from datasets import load_dataset

    kind = _FILE_KINDS.get(Path(spec.path).suffix)
    if kind is not None and not Path(spec.path).exists():
        raise DatasetError(f"dataset file {spec.path!r} does not exist (paths are relative to {Path.cwd()}).")
    try:
        if kind is not None:
            return load_dataset(kind, data_files={"train": spec.path}, split=spec.split)
        return load_dataset(spec.path, spec.name, split=spec.split, data_files=spec.data_files)
    except Exception as error:
        # datasets raises whatever its readers and the hub's client do.
        said = " ".join(str(error).split())[:400]
        raise DatasetError(
            f"dataset {spec.path!r}, split {spec.split!r}, cannot be loaded ({type(error).__name__}: {said}). Give a "
            ".json, .jsonl, .parquet or .csv file, or a hub id with one of its splits."
        ) from error


def load_reward(spec: RewardSpec) -> Callable[..., Any]:
    """Find a reward function, or call what makes one.

    Raises:
        ConfigError: There is none of that name.
    """
    found = _find_reward(spec.target)
    if not callable(found):
        raise ConfigError(f"reward {spec.target!r} is a {type(found).__name__} and cannot be called. Name a function.")
    if spec.arguments is None:
        if spec.target in _KNOWN_MAKERS:
            raise ConfigError(f"reward {spec.target!r} makes a reward and needs arguments: `{spec.target}: {{...}}`.")
        return cast("Callable[..., Any]", found)
    if spec.target in _KNOWN_REWARDS:
        raise ConfigError(f"reward {spec.target!r} takes no arguments here. Write its name alone.")
    try:
        made = found(**spec.arguments)
    except TypeError as error:
        raise ConfigError(f"reward {spec.target!r} cannot be made with {dict(spec.arguments)}: {error}.") from error
    if not callable(made):
        raise ConfigError(f"{spec.target}(...) gave a {type(made).__name__}, not a reward function.")
    return cast("Callable[..., Any]", made)


def make_peft_config(values: Mapping[str, Any]) -> Any:
    """Return a `LoraConfig`.

    Raises:
        ConfigError: PEFT is not installed, or a field is not known.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("peft_config is set, but PEFT is not installed. Run: pip install peft") from error
    refuse_unknown(values, {declared.name for declared in fields(LoraConfig) if declared.init}, "peft_config")
    return LoraConfig(**{"task_type": "CAUSAL_LM", **values})


def _find_reward(target: str) -> Any:
    if ":" not in target:
        refuse_unknown(
            [target], {*_KNOWN_REWARDS, *_KNOWN_MAKERS}, "reward_funcs (a name without `:` is one of Shoal's)"
        )
        return getattr(rewards, target)
    place, _, name = target.rpartition(":")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_module(place, target)
    if not hasattr(module, name):
        raise ConfigError(f"reward {target!r}: {place} has no {name!r}. Name a function that it defines.")
    return getattr(module, name)


def _from_module(name: str, target: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python train.py` has it; a console script has not
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise ConfigError(
            f"reward {target!r}: there is no module {name!r}. Give file.py:function, or install it."
        ) from None


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"reward file {str(path)!r} does not exist (paths are relative to {Path.cwd()}).")
    # Registered, so that rewards that run in processes of their own can be found again by name.
    name = f"shoal_rewards_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
