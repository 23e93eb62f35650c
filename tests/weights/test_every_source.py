"""Every kind of trainer publishes to every layout of real engines: bit for bit, and then text for text.

One fleet for an architecture: two engines with one worker each and one with two (tensor parallel). One trainer after
the other takes it over, those with as many ranks in the same processes, which cost more to start than to use: plain,
a LoRA adapter merged, the adapter alone; DDP, FSDP2, and ZeRO-3 where DeepSpeed is installed.
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
# With adapters vLLM computes experts by Triton kernels alone: on CPUs such an engine takes weights but writes no text.
DENSE, EXPERTS = ("qwen2", "llama", "qwen3", "gemma3"), ("qwen3-moe", "mixtral")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO3 = pytest.param(
    "zero3",
    marks=pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed (pip install 'shoal[deepspeed]')"),
)
ALONE, SHARING = ("plain", "lora", "adapter"), ("ddp", "fsdp2", *(("zero3",) if HAS_DEEPSPEED else ()))  # 1 rank, and 2
# The others take as long again and find the same: `pytest --all-architectures`.
IN_CI = ("qwen2", "qwen3-moe")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    def chosen(names: tuple[str, ...]) -> list[str]:
        return [name for name in names if name in IN_CI or metafunc.config.getoption("--all-architectures")]

    if "served" in metafunc.fixturenames:
        names = DENSE if "served_with_adapter" in metafunc.fixturenames else DENSE + EXPERTS
        metafunc.parametrize("served", chosen(names), indirect=True, scope="module")
    elif "experts" in metafunc.fixturenames:
        metafunc.parametrize("experts", chosen(EXPERTS))


@dataclass(frozen=True)
class Served:
    """A fleet for one architecture, and what the trainers said that took it over."""

    architecture: str
    fleet: Fleet
    said: dict[tuple[str, ...], str] = field(default_factory=dict)

    def assert_equal(self, source: str) -> None:
        """Check what the trainer of this source said, with others of as many ranks."""
        ranks = 2 if source in SHARING else 1
        sources = SHARING if ranks == 2 else ALONE if self.architecture in DENSE else ALONE[:-1]
        if sources not in self.said:
            self.said[sources] = run_trainers(sources, self.architecture, self.fleet, num_ranks=ranks)
        assert f"{source}: published and equal\n" in self.said[sources], self.said[sources][-4000:]


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest, make_spec: Callable[..., EngineSpec], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    with started(request.param, make_spec, folder, serves_adapter=request.param in DENSE) as fleet:
        yield Served(request.param, fleet)


@pytest.fixture
def served_with_adapter(served: Served) -> Served:
    """Return one whose engines serve an adapter too."""
    return served


def started(architecture: str, make_spec: Callable[..., EngineSpec], folder: Path, *, serves_adapter: bool) -> Fleet:
    """Start two engines with one worker each and one with two."""
    write_model_and_adapter(architecture, folder)
    ports = choose_ports(3, None)
    common: dict[str, Any] = {"model_dir": folder / "model"}
    if serves_adapter:
        common |= {"lora_adapter": folder / "adapter", "max_lora_rank": 4}
    specs = [
        make_spec("engine-0", ports[0], cpu_cores=(0,), **common),
        make_spec("engine-1", ports[1], cpu_cores=(1,), **common),
        make_spec("engine-2", ports[2], cpu_cores=(0, 1), tensor_parallel_size=2, **common),
    ]
    return Fleet.start(specs, log_dir=folder, timeout_s=400, request_timeout_s=90)


# These two come first, while no other engine runs.
def test_an_adapter_beside_experts_arrives_bit_for_bit(
    experts: str, make_spec: Callable[..., EngineSpec], tmp_path: Path
) -> None:
    with started(experts, make_spec, tmp_path, serves_adapter=True) as fleet:
        said = run_trainers(("adapter",), experts, fleet, num_ranks=1, compares_text=False)
    assert "adapter: published and equal\n" in said, said[-4000:]


def test_a_pipeline_of_two_stages_proves_what_it_holds(make_spec: Callable[..., EngineSpec], tmp_path: Path) -> None:
    """By digest and bit for bit alone: vLLM 0.32 cannot generate with two stages on CPUs."""
    write_model_and_adapter("qwen2", tmp_path)
    (port,) = choose_ports(1, None)
    spec = make_spec("engine-0", port, model_dir=tmp_path / "model", pipeline_parallel_size=2)
    with Fleet.start([spec], log_dir=tmp_path, timeout_s=400, request_timeout_s=90) as fleet:
        said = run_trainers(("fsdp2",), "qwen2", fleet, num_ranks=2, compares_text=False)
    assert "fsdp2: published and equal\n" in said, said[-4000:]


@pytest.mark.parametrize("source", [*ALONE[:-1], "ddp", "fsdp2", ZERO3])
def test_three_publishes_each_arrive_bit_for_bit(served: Served, source: str) -> None:
    served.assert_equal(source)


def test_an_adapter_alone_arrives_bit_for_bit(served_with_adapter: Served) -> None:
    served_with_adapter.assert_equal("adapter")


def run_trainers(
    sources: tuple[str, ...], architecture: str, fleet: Fleet, *, num_ranks: int, compares_text: bool = True
) -> str:
    """Have one trainer after the other take the fleet over and compare everything; return what they said."""
    task = {
        "sources": sources,
        "architecture": architecture,
        "engines": [described(engine) for engine in fleet.engines],
        "compares_text": compares_text,
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


def described(engine: Any) -> dict[str, Any]:
    return {
        "name": engine.name,
        "url": engine.client.url,
        "key": engine.client._sync.headers["authorization"].removeprefix("Bearer "),
        "log": str(engine.process.log_path),
        "workers": engine.spec.num_workers,
        "answers_as": engine.client._model,  # the adapter's name, where it serves one
    }
