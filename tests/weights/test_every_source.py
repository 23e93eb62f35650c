"""Every kind of trainer publishes to every layout of real engines: bit for bit, and then text for text.

One fleet for an architecture, of engines with one worker, with two (tensor parallel) and with two stages (pipeline
parallel), of which some serve an adapter. One trainer after the other takes it over, those with as many ranks in the
same processes, which cost more to start than to use: plain, a LoRA adapter merged, the adapter alone; DDP, FSDP2, and
ZeRO-3 where DeepSpeed is installed.

In CI one dense architecture and one with experts, each to two engines of other layouts than the other's.
`pytest --all-architectures` publishes to all architectures, each in all layouts and to two engines of the same one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shoal.engines.command import EngineSpec
from shoal.engines.fleet import Fleet
from shoal.engines.process import choose_ports
from shoal.testing import tiny_tokenizer

pytestmark = pytest.mark.engine

FOLDER = Path(__file__).with_name("every_source")
DENSE, EXPERTS = ("qwen2", "llama", "qwen3", "gemma3"), ("qwen3-moe", "mixtral")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO3 = pytest.param(
    "zero3",
    marks=pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed (pip install 'shoal[deepspeed]')"),
)
IN_CI = ("qwen2", "qwen3-moe")
# With one rank and with two.
ALONE, SHARING = ("plain", "lora", "adapter"), ("ddp", "fsdp2", *(("zero3",) if HAS_DEEPSPEED else ()))

ADAPTER = {"serves_adapter": True}
TWO_WORKERS: dict[str, Any] = {"tensor_parallel_size": 2, "cpu_cores": (0, 1)}
TWO_STAGES: dict[str, Any] = {"pipeline_parallel_size": 2}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "served" in metafunc.fixturenames:
        names = DENSE + EXPERTS if metafunc.config.getoption("--all-architectures") else IN_CI
        metafunc.parametrize("served", names, indirect=True, scope="module")


def layouts(architecture: str, *, all_of_them: bool) -> list[dict[str, Any]]:
    """Return what is asked of each engine of a fleet."""
    if architecture in DENSE:
        stages = [TWO_STAGES] if architecture == "qwen2" else []
        again = [{"cpu_cores": (0,), **ADAPTER}, {"cpu_cores": (1,), **ADAPTER}] if all_of_them else []
        return [TWO_WORKERS | ADAPTER, *stages, *again]
    again = [{"cpu_cores": (0,)}, {"cpu_cores": (1,)}, TWO_WORKERS | ADAPTER] if all_of_them else []
    return [TWO_WORKERS, {"cpu_cores": (0,), **ADAPTER}, *again]


@dataclass(frozen=True)
class Served:
    """A fleet for one architecture, and what the trainers said that took it over."""

    architecture: str
    fleet: Fleet
    said: dict[tuple[str, ...], str] = field(default_factory=dict)

    def assert_equal(self, source: str) -> None:
        """Check what the trainer of this source said, with others of as many ranks."""
        ranks, sources = (2, SHARING) if source in SHARING else (1, ALONE)
        if sources not in self.said:
            self.said[sources] = run_trainers(sources, self.architecture, self.fleet, num_ranks=ranks)
        assert f"{source}: published and equal\n" in self.said[sources], self.said[sources][-4000:]


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest, make_spec: Callable[..., EngineSpec], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    write_model_and_adapter(request.param, folder)
    asked = layouts(request.param, all_of_them=request.config.getoption("--all-architectures"))
    specs = []
    for number, (layout, port) in enumerate(zip(asked, choose_ports(len(asked), None), strict=True)):
        engine = {"model_dir": folder / "model"} | layout
        if engine.pop("serves_adapter", False):
            engine |= {"lora_adapter": folder / "adapter", "max_lora_rank": 4}
        specs.append(make_spec(f"engine-{number}", port, **engine))
    with Fleet.start(specs, log_dir=folder, timeout_s=400, request_timeout_s=90) as fleet:
        yield Served(request.param, fleet)


@pytest.mark.parametrize("source", [*ALONE, "ddp", "fsdp2", ZERO3])
def test_three_publishes_each_arrive_bit_for_bit(served: Served, source: str) -> None:
    served.assert_equal(source)


def run_trainers(sources: tuple[str, ...], architecture: str, fleet: Fleet, *, num_ranks: int) -> str:
    """Have one trainer after the other take the fleet over and compare everything; return what they said."""
    task = {
        "sources": sources,
        "architecture": architecture,
        "engines": [described(engine, architecture) for engine in fleet.engines],
    }
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(num_ranks),
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), str(FOLDER / "trainer.py"), json.dumps(task)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400, check=False
    )
    return done.stdout + done.stderr


def write_model_and_adapter(architecture: str, folder: Path) -> None:
    """Write what engines read, in a process of its own: the adapter's folder holds other values than are published."""
    code = (
        "import sys, trainer, shoal.weights.sources as sources; from pathlib import Path\n"
        "folder = Path(sys.argv[2]); adapted, _ = trainer.prepare('adapter', sys.argv[1])\n"
        "trainer.change(adapted, seed=7, scale=0.2); sources.write_adapter(adapted, folder / 'adapter')\n"
        "base = adapted.get_base_model(); base.config.architectures = [type(base).__name__]\n"
        "base.config.save_pretrained(folder / 'model')"
    )
    subprocess.run([sys.executable, "-c", code, architecture, str(folder)], cwd=FOLDER, check=True, timeout=120)
    tiny_tokenizer().save_pretrained(folder / "model")


def described(engine: Any, architecture: str) -> dict[str, Any]:
    """Return what a trainer has to know of an engine.

    On CPUs vLLM 0.32 cannot generate with two stages, and computes experts beside an adapter by Triton kernels alone,
    which are not there: such engines take weights, and prove them, but write no text.
    """
    serves_adapter = engine.spec.lora_adapter is not None
    return {
        "name": engine.name,
        "url": engine.client.url,
        "key": engine.client._sync.headers["authorization"].removeprefix("Bearer "),
        "log": str(engine.process.log_path),
        "workers": engine.spec.num_workers,
        "answers_as": engine.client._model,  # the adapter's name, where it serves one
        "serves_adapter": serves_adapter,
        "writes_text": engine.spec.pipeline_parallel_size == 1 and not (serves_adapter and architecture in EXPERTS),
    }
