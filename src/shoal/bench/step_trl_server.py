"""The vLLM server that TRL asks in its server mode, and whether TRL can run a layout at all."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from shoal.bench.process_group import end_group
from shoal.bench.step_run import StepRun
from shoal.bench.step_settings import StepSettings
from shoal.engines.command import LOOPBACK, without_launcher_variables
from shoal.engines.process import choose_ports

SERVER_TIMEOUT_S = 900.0


def why_not_trl(settings: StepSettings) -> str | None:
    """Return why TRL cannot do the same work in a part, or None if it can."""
    if importlib.util.find_spec("trl") is None:
        return "TRL is not installed"
    if settings.device == "cpu":
        return "with ragged lengths TRL needs vLLM, and it has none on CPUs" if settings.is_ragged else None
    if settings.layout == "dedicated" and settings.num_engines > 1:
        return "TRL's server mode takes one server, whose data parallelism is for mixtures of experts only"
    if settings.layout == "colocated" and settings.num_engines * settings.tensor_parallel_size != settings.num_ranks:
        return "TRL's colocate mode has engines on all ranks"
    if settings.is_ragged and settings.layout == "colocated" and settings.tensor_parallel_size > 1:
        return "ragged lengths are asked of TRL's colocated engines rank by rank, which tensor parallel ones are not"
    if settings.is_ragged and settings.layout == "dedicated" and settings.num_ranks > 1:
        return "ragged lengths are asked of TRL's server by one rank"
    return None


def server_command(run: StepRun, model: Path, port: int) -> list[str]:
    """Return what TRL 1.16 starts for its server mode."""
    settings = run.common
    return [
        sys.executable, "-m", "trl.scripts.vllm_serve",
        "--model", str(model),
        "--host", LOOPBACK,
        "--port", str(port),
        "--tensor_parallel_size", str(settings.tensor_parallel_size),
        "--gpu_memory_utilization", str(settings.gpu_memory_utilization or 0.9),
        "--max_model_len", str(settings.prompt_tokens + run.longest_completion),
        "--dtype", "bfloat16",
    ]  # fmt: skip


@contextmanager
def trl_server(run: StepRun, folder: Path, visible_ids: Mapping[int, str]) -> Iterator[str]:
    """Run the server where the layout needs one; give its URL, or an empty text. TRL itself waits until it is ready."""
    settings = run.common
    if settings.device == "cpu" or settings.layout == "colocated":
        yield ""
        return
    (port,) = choose_ports(1, None)
    environment = without_launcher_variables(os.environ) | {
        "CUDA_VISIBLE_DEVICES": ",".join(visible_ids[index] for index in settings.engine_devices),
        "VLLM_HOST_IP": LOOPBACK,
    }
    with (folder / "trl-server.log").open("wb") as log:
        server = subprocess.Popen(
            server_command(run, folder / "model", port),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield f"http://{LOOPBACK}:{port}"
        finally:
            end_group(server)
