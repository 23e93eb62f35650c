"""A trainer whose engines are on two Ray nodes of this machine: one node is killed, the run goes on with the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from transformers import TrainerCallback

from shoal import GRPOTrainer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without cores, and two nodes with one each."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, include_dashboard=False)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


class KillsANode(TrainerCallback):  # type: ignore[misc]
    """Kills the node of an engine after the first step, without a word to anybody."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.trainer: Any = None
        self.engines: list[tuple[str, list[psutil.Process]]] = []
        self.lost = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 1:
            return
        fleet = self.trainer.rollouts.fleet
        nodes = {node.unique_id: node for node in self._cluster.worker_nodes}
        for node in nodes.values():
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            below = raylet.children(recursive=True)
            (engine,) = (
                engine.name
                for engine in fleet.engines
                if any(f"--port {urlsplit(engine.client.url).port} " in " ".join(p.cmdline()) for p in below)
            )
            self.engines.append((engine, below))
        self.lost = self.engines[0][0]
        self._cluster.remove_node(next(iter(nodes.values())), allow_graceful=False)
        # The guard ends the engine some seconds later, in which two more steps could end.
        wait_until_gone(self.engines[0][1])


@pytest.fixture(autouse=True)
def only_if_wanted(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--ray-engines"):
        pytest.skip(
            "takes minutes on two cores: pass --ray-engines (tests/engines/test_ray_engine.py tries Ray's part)"
        )


def test_engines_run_on_both_nodes_and_the_loss_of_one_node_does_not_end_the_run(
    make_trainer: Callable[..., Any], make_served_model: Callable[..., Any], cluster: Any
) -> None:
    killer = KillsANode(cluster)
    trainer = make_trainer(
        kind=GRPOTrainer,
        model=make_served_model(seed=3),
        vllm_launcher="ray",
        vllm_num_engines=2,
        vllm_startup_timeout_s=400.0,
        weight_sync_timeout_s=60.0,
        vllm_stall_timeout_s=20.0,
        max_steps=3,
        callbacks=[killer],
    )
    killer.trainer = trainer
    trainer.train()
    assert trainer.state.global_step == 3
    assert {name for name, _ in killer.engines} == {"engine-0", "engine-1"}  # one on each node
    assert trainer.publisher.live_engines == tuple({"engine-0", "engine-1"} - {killer.lost})
    assert trainer.publisher.num_proven == 4
    logs = {engine.name: engine.process.log_path.read_text() for engine in trainer.rollouts.fleet.engines}
    assert all("Application startup complete" in log for log in logs.values())  # fetched from the nodes
    trainer.close()
    wait_until_gone([process for process in killer.engines[1][1] if "vllm" in safe_cmdline(process)])


def safe_cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def wait_until_gone(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + 60
    while left := [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, [safe_cmdline(process) for process in left]
        time.sleep(0.1)
