"""What the tests with real vLLM engines share: a model small enough to serve on a CPU, and how to start it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import HealthCheck, settings

from shoal.engines.command import EngineSpec
from shoal.testing import tiny_model, tiny_tokenizer

SpecMaker: TypeAlias = Callable[..., EngineSpec]

KillRow: TypeAlias = dict[str, object]
_KILLS = pytest.StashKey[list[KillRow]]()


# What `--all` asks for beside the full matrices.
_PARTS_OF_ALL = ("--all-architectures", "--all-shardings", "--bench-engines", "--ray-engines")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help=f"every combination instead of CI's choice; also {', '.join(_PARTS_OF_ALL)}"
    )
    parser.addoption(
        "--all-architectures", action="store_true", help="publish to engines of every architecture, not of two"
    )
    parser.addoption("--num-kills", type=int, default=1, help="how often to kill an engine, and a trainer, mid-publish")
    parser.addoption("--kills-seed", type=int, default=random.randrange(1 << 31), help="of whom and when to kill")
    parser.addoption("--kills-report", type=Path, help="file to write what became of each to, as JSON")
    parser.addoption("--all-shardings", action="store_true", help="train under every combination of shardings")
    parser.addoption(
        "--bench-engines", action="store_true", help="run each benchmark with real engines, which takes minutes"
    )
    parser.addoption(
        "--ray-engines", action="store_true", help="train with real engines on two Ray nodes, one of which is killed"
    )
    parser.addoption("--soak-rounds", type=int, default=1, help="times that an engine is lost while three write")
    parser.addoption("--soak-seed", type=int, default=None, help="of the choice of engine, fate and moment")


def pytest_configure(config: pytest.Config) -> None:
    # A slow machine is no counterexample.
    settings.register_profile("shoal", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("shoal")
    config.stash[_KILLS] = []
    if given := getattr(config, "workerinput", None):  # one of pytest-xdist's workers, of which each draws another seed
        config.option.kills_seed = given["kills_seed"]
        torch.set_num_threads(1)  # they share the cores
    if config.getoption("--all"):
        for name in _PARTS_OF_ALL:
            setattr(config.option, name.removeprefix("--").replace("-", "_"), True)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist what this process has drawn."""
    node.workerinput["kills_seed"] = node.config.getoption("--kills-seed")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist, hand over what became of each kill."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["kills"] = session.config.stash[_KILLS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist says as it ends."""
    node.config.stash[_KILLS] += getattr(node, "workeroutput", {}).get("kills", [])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that start engines: what is short then fills the cores to the end."""
    slow = {item.path for item in items if item.get_closest_marker("engine")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def kills(pytestconfig: pytest.Config) -> list[KillRow]:
    """Return the list of what became of each kill, which is printed at the end."""
    return pytestconfig.stash[_KILLS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_KILLS]
    if not rows:
        return
    terminalreporter.section(f"kills (seed {config.getoption('--kills-seed')})")
    columns = list(rows[0])
    widths = [
        max(len(str(row[column])) for row in (*rows, dict(zip(columns, columns, strict=True)))) for column in columns
    ]
    for row in (dict(zip(columns, columns, strict=True)), *rows):
        cells = (str(row[column]).ljust(width) for column, width in zip(columns, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
    if path := config.getoption("--kills-report"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seed": config.getoption("--kills-seed"), "kills": rows}, indent=1) + "\n")


@pytest.fixture(scope="session")
def make_served_model() -> Callable[..., Any]:
    """Return a maker of models that vLLM's CPU attention can serve (its heads must be 32 wide at least).

    Biases, a vocabulary that vLLM pads and tied embeddings are there because each goes its own way into an engine.
    """

    def make(**overrides: Any) -> Any:
        settings = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 300, "attention_bias": True}
        return tiny_model(**(settings | overrides)).eval()

    return make


@pytest.fixture(scope="session")
def served_model_dir(tmp_path_factory: pytest.TempPathFactory, make_served_model: Callable[..., Any]) -> Path:
    """Return a folder with the config and the tokenizer of such a model, and no weights."""
    folder = tmp_path_factory.mktemp("served_model")
    make_served_model().config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_spec(served_model_dir: Path) -> SpecMaker:
    """Return a maker of specs of CPU engines that serve it."""

    def make(name: str, port: int, **changes: Any) -> EngineSpec:
        settings: dict[str, Any] = {
            "model_dir": served_model_dir,
            "cuda_devices": (),
            "cpu_cores": (),
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "dtype": "float32",
            "max_model_len": 256,
            "gpu_memory_utilization": 0.9,
            "cpu_kv_cache_gib": 1,
            "seed": 0,
            "extra_arguments": {},
        }
        return EngineSpec(name=name, port=port, **(settings | changes))

    return make
