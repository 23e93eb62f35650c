"""Engines on the nodes of a Ray cluster: placed by placement groups, started by an actor, and watched from here."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal.engines.command import EngineSpec
from shoal.engines.guard import GRACE_S
from shoal.engines.process import reason_in, stage_in, tail
from shoal.engines.ray_host import EngineHost
from shoal.errors import ConfigError, EngineStartError

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_REPORT_S = 30.0
_AGAIN_S = 60.0
_MISSED_REPORTS = 4
_TAIL_LINES = 400
_LOST = 1
"""Exit status of an engine whose node or actor is gone."""


class RayEngine:
    """An `EngineHandle` of an engine on a Ray node. A thread keeps its log and its status up to date.

    Args:
        spec: What was started.
        actor: Its `EngineHost`.
        group: The placement group that it is in; None for one that places its own workers.
        log_path: Takes what the engine prints.
        again: Starts another in its place.
    """

    def __init__(
        self, spec: EngineSpec, actor: Any, group: Any, log_path: Path, again: Callable[[Path], tuple[RayEngine, str]]
    ) -> None:
        self.spec = spec
        self.log_path = log_path
        self._actor = actor
        self._group = group
        self._again = again
        self._life = 0
        self._status: int | None = None
        self._lost = ""
        self._ending: Any = None
        self._ends = threading.Event()
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.write_bytes(b"")
        self._thread = threading.Thread(target=self._watch, daemon=True, name=f"{spec.name} on Ray")
        self._thread.start()

    @property
    def has_plugin(self) -> bool:
        """Always: `serve_command` sees to it."""
        return True

    @property
    def num_workers(self) -> int:
        """vLLM's worker processes."""
        return self.spec.num_workers

    def exit_status(self) -> int | None:
        """Return the engine's exit status as far as is known, or None while it lives."""
        return self._status

    def why_it_died(self) -> str:
        """Return what became of its node, or the most telling line of its log."""
        return self._lost or reason_in(tail(self.log_path, _TAIL_LINES))

    def stage(self) -> str:
        """Say how far the start is."""
        return stage_in(tail(self.log_path, _TAIL_LINES))

    def ask_to_end(self) -> None:
        """Begin ending the engine."""
        if not self._ends.is_set():
            self._ends.set()
            if _is_connected():
                self._ending = self._actor.end.remote()

    def wait_ended(self) -> None:
        """Wait until no process of the engine is left, and give its devices back."""
        import ray

        if self._ending is not None and not self._lost and _is_connected():
            with suppress(ray.exceptions.RayError):
                ray.get(self._ending, timeout=GRACE_S + 30.0)
        _give_back(self._actor, self._group)
        self._thread.join(_REPORT_S)

    def start_again(self) -> tuple[RayEngine, str]:
        """Start the engine anew, on any node with free devices; return the new one, and its URL.

        Raises:
            EngineStartError: No node did it.
            ConfigError: No node has room.
        """
        self.ask_to_end()
        self.wait_ended()
        assert self.spec is not None
        life = self._life + 1
        engine, url = self._again(self.log_path.with_name(f"{self.spec.name}.restart-{life}.log"))
        engine._life = life
        return engine, url

    def _watch(self) -> None:
        import ray

        missed = 0
        while self._status is None and not self._ends.wait(_POLL_S):
            if not _is_connected():
                self._lose("the trainer has left the Ray cluster")
                return
            try:
                report = ray.get(self._actor.report.remote(self.log_path.stat().st_size), timeout=_REPORT_S)
            except ray.exceptions.GetTimeoutError:
                missed += 1
                if missed == _MISSED_REPORTS:
                    self._lose(f"its node has said nothing for {missed * _REPORT_S:.0f} s")
            except ray.exceptions.RayError as error:
                self._lose(f"its node or its Ray actor is gone: {str(error).splitlines()[0]}")
            else:
                missed = 0
                with self.log_path.open("ab") as log:
                    log.write(report.printed)
                self._status = report.exit_status

    def _lose(self, why: str) -> None:
        if not self._ends.is_set():
            self._lost = why
            self._status = _LOST


class RayLauncher:
    """A `Launch` that starts engines on any node of a Ray cluster.

    An engine gets one node with a device for each of its workers; one that is larger than every node is spread over
    several by vLLM's own Ray executor. Nodes need Shoal and vLLM installed, and no shared folder.

    Args:
        on_gpus: Whether engines use GPUs; else CPU cores.
        timeout_s: For devices to become free, and actors to start.
    """

    def __init__(self, *, on_gpus: bool, timeout_s: float) -> None:
        self._on_gpus = on_gpus
        self._timeout_s = timeout_s

    def __call__(self, specs: Sequence[EngineSpec], api_key: str, log_dir: Path) -> list[tuple[RayEngine, str]]:
        """Start each engine somewhere, side by side.

        Raises:
            ConfigError: Ray is not installed, no cluster runs, or it has too few devices.
            EngineStartError: A node did not do it.
        """
        return self._launch(specs, api_key, [log_dir / f"{spec.name}.log" for spec in specs], self._timeout_s)

    def _launch(
        self, specs: Sequence[EngineSpec], api_key: str, log_paths: Sequence[Path], timeout_s: float
    ) -> list[tuple[RayEngine, str]]:
        ray = connect()
        nodes = _largest_first(ray.nodes(), "GPU" if self._on_gpus else "CPU")
        engines: list[RayEngine] = []
        groups: list[Any] = []
        try:
            placed = [self._with_executor(spec, nodes) for spec in specs]
            groups = [self._reserve(spec) for spec in placed]
            self._wait_reserved(placed, groups, timeout_s)
            for spec, group, log_path in zip(placed, groups, log_paths, strict=True):
                actor = self._actor(spec, group, nodes[len(engines) % len(nodes)]["NodeID"])
                engines.append(RayEngine(spec, actor, group, log_path, self._relaunch(spec, api_key)))
            with ThreadPoolExecutor(len(engines)) as threads:
                urls = list(threads.map(lambda engine: self._start(engine, api_key), engines))
        except BaseException:
            for group in groups:
                _give_back(None, group)
            for engine in engines:
                engine.ask_to_end()
            for engine in engines:
                engine.wait_ended()
            raise
        return list(zip(engines, urls, strict=True))

    def _relaunch(self, spec: EngineSpec, api_key: str) -> Callable[[Path], tuple[RayEngine, str]]:
        """Return what starts one engine again, writing to another log."""

        def relaunch(log_path: Path) -> tuple[RayEngine, str]:
            (started,) = self._launch([spec], api_key, [log_path], _AGAIN_S)
            return started

        return relaunch

    def _with_executor(self, spec: EngineSpec, nodes: Sequence[Mapping[str, Any]]) -> EngineSpec:
        if not self._on_gpus or spec.num_workers <= nodes[0]["Resources"].get("GPU", 0.0):
            return spec
        logger.info("%s is larger than every node: vLLM's Ray executor spreads it over several", spec.name)
        return replace(spec, executor="ray")

    def _reserve(self, spec: EngineSpec) -> Any:
        """Ask for one node's devices; vLLM's Ray executor asks for its own."""
        from ray.util.placement_group import placement_group

        if spec.executor == "ray":
            return None
        bundle = {"CPU": 1.0, "GPU": float(spec.num_workers)} if self._on_gpus else {"CPU": float(spec.num_workers)}
        return placement_group([bundle], strategy="STRICT_PACK", name=f"shoal {spec.name}")

    def _wait_reserved(self, specs: Sequence[EngineSpec], groups: Sequence[Any], timeout_s: float) -> None:
        import ray

        wanted = [group.ready() for group in groups if group is not None]
        waiting = ray.wait(wanted, num_returns=len(wanted), timeout=timeout_s)[1] if wanted else []
        if waiting:
            kind = "GPU" if self._on_gpus else "CPU"
            there = ray.cluster_resources().get(kind, 0)
            raise ConfigError(
                f"{len(waiting)} of {len(specs)} engines found no Ray node within {timeout_s:g} s with "
                f"{specs[0].num_workers} free {kind}s each (the cluster has {there:g} {kind}s). Lower vllm_num_engines "
                "or vllm_tensor_parallel_size, or add nodes."
            )

    def _actor(self, spec: EngineSpec, group: Any, node: str) -> Any:
        """Return the actor that will start an engine: in its placement group, or on a node where that has none."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

        # Ray would kill the guard with its actor, and the guard is what ends the engine's own processes.
        options: dict[str, Any] = {"runtime_env": {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "false"}}}
        if group is not None:
            options["num_cpus"] = 1.0 if self._on_gpus else float(spec.num_workers)
            options["num_gpus"] = float(spec.num_workers) if self._on_gpus else 0.0
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=0
            )
        else:
            # vLLM wants its server on a node that has some of the workers.
            options |= {"num_cpus": 0.0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
        # Reports come while another call ends the engine.
        return ray.remote(EngineHost).options(max_concurrency=2, **options).remote()

    def _start(self, engine: RayEngine, api_key: str) -> str:
        import ray

        spec = engine.spec
        files = {"model": _contents(spec.model_dir)}
        if spec.lora_adapter is not None:
            files["adapter"] = _contents(spec.lora_adapter)
        try:
            url: str = ray.get(engine._actor.start.remote(spec, api_key, files), timeout=self._timeout_s)
        except ray.exceptions.RayError as error:
            raise EngineStartError(f"{spec.name} could not be started on a Ray node: {error}") from error
        logger.info("%s is on a Ray node, at %s", spec.name, url)
        return url


def connect() -> Any:
    """Return the module `ray`, connected to the cluster that runs.

    Raises:
        ConfigError: Ray is not installed, or no cluster runs.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError('vllm_launcher="ray" needs Ray. Run: pip install "shoal[ray]", on every node.') from None
    if not ray.is_initialized():
        try:
            # Loggers and tracebacks of this process stay as they are.
            ray.init(address="auto", log_to_driver=False, configure_logging=False)
        except ConnectionError as error:
            raise ConfigError(
                f'vllm_launcher="ray" found no Ray cluster ({str(error).splitlines()[0]}). Start one with '
                "`ray start --head` and `ray start --address=HEAD:6379`, or set RAY_ADDRESS."
            ) from None
    return ray


def _is_connected() -> bool:
    """Whether this process still is in a cluster. Else its actors have ended, and any call would join one again.

    At the interpreter's exit that would wait for minutes, if the cluster is gone too.
    """
    import ray

    return bool(ray.is_initialized())


def _largest_first(nodes: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    alive = [node for node in nodes if node["Alive"]]
    return sorted(alive, key=lambda node: -float(node["Resources"].get(kind, 0.0)))


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _give_back(actor: Any, group: Any) -> None:
    """End an actor and a placement group, whether or not anything of them is left."""
    import ray
    from ray.util.placement_group import remove_placement_group

    if not _is_connected():
        return
    with suppress(ray.exceptions.RayError, ValueError):
        if actor is not None:
            ray.kill(actor)
    with suppress(ray.exceptions.RayError, ValueError):
        if group is not None:
            remove_placement_group(group)
