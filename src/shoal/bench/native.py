"""The peer: engines updated with vLLM's own packed NCCL broadcast, from the same model over the same devices.

Run as `python -m shoal.bench.native ANSWER SETTINGS FOLDER`. It sends the whole model from one process, whatever the
source of the run is: that is all it can do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from shoal.bench.children import run_children
from shoal.bench.model import build_model, change_weights
from shoal.bench.settings import BenchSettings, engine_specs
from shoal.engines.command import LOOPBACK
from shoal.engines.fleet import Fleet
from shoal.engines.process import choose_ports
from shoal.placement.devices import discover_devices
from shoal.weights.native_api import FanOut, connect_native, outgoing_of

NUM_WARM_UPS = 2
_START_TIMEOUT_S = 900.0
_REQUEST_TIMEOUT_S = 300.0


def why_not(settings: BenchSettings) -> str | None:
    """Say why vLLM's own update cannot be measured here, or return None."""
    if settings.device == "cpu":
        return "vLLM's NCCL update needs GPUs"
    if settings.is_colocated:
        return "vLLM's NCCL update needs a GPU for the trainer and others for the engines"
    return None


def measure_native(settings: BenchSettings, folder: Path, timeout_s: float) -> dict[str, list[float]]:
    """Return seconds of each repeat: `"update"` (start to finish) and `"total"` (pause to resume).

    Args:
        settings: The layout.
        folder: Holds the model's configuration; engines write their logs there.
        timeout_s: For all of it.

    Raises:
        StageError: It failed or hung.
    """
    answer: dict[str, list[float]] = run_children(
        "shoal.bench.native", [(settings.to_json(), str(folder))], timeout_s=timeout_s
    )
    return answer


def main(answer: str, settings_text: str, folder: str) -> None:
    """Start the engines, update them again and again, and write down how long it took."""
    settings = replace(BenchSettings.from_json(settings_text), source="plain", num_ranks=1)
    torch.cuda.set_device(0)
    specs = engine_specs(
        settings,
        Path(folder),
        discover_devices(),
        extra_arguments={"weight-transfer-config": json.dumps({"backend": "nccl"})},
    )
    with Fleet.start(
        specs,
        log_dir=Path(folder) / "native",
        timeout_s=_START_TIMEOUT_S,
        request_timeout_s=_REQUEST_TIMEOUT_S,
    ) as fleet:
        model = build_model(settings, torch.device("cuda", 0))
        engines = FanOut(
            [engine.client for engine in fleet.engines],
            [engine.num_workers for engine in fleet.engines],
            _REQUEST_TIMEOUT_S,
        )
        (port,) = choose_ports(1, None)
        send = connect_native(engines, outgoing_of(model), host=LOOPBACK, port=port)
        result: dict[str, list[float]] = {"update": [], "total": []}
        for _ in range(NUM_WARM_UPS + settings.repeats):
            change_weights(model, settings)
            torch.cuda.synchronize()
            began = time.perf_counter()
            engines.post_all("/pause?mode=keep&clear_cache=false")
            paused = time.perf_counter()
            send()
            result["update"].append(time.perf_counter() - paused)
            engines.post_all("/resume")
            result["total"].append(time.perf_counter() - began)
        Path(answer).write_text(json.dumps({name: values[NUM_WARM_UPS:] for name, values in result.items()}))
    # vLLM's communicator may wait for workers that are gone; what it was for is done.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
