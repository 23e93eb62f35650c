"""`shoal bench step`: the same steps in Shoal and in TRL, one after the other on the same devices.

Each trainer has processes of its own, so that what one took is free for the other. What fails leaves its figures empty,
with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from shoal.bench.children import StageError
from shoal.bench.launch import run_to_end, with_ranks
from shoal.bench.memory import MemoryWatch, Probe, resident, used_on_gpus
from shoal.bench.results import store
from shoal.bench.step_report import Measured, StepReport, default_path, measured_from
from shoal.bench.step_settings import StepSettings, write_model
from shoal.bench.step_trl_server import trl_server, why_not_trl
from shoal.engines.command import LOOPBACK, without_launcher_variables
from shoal.placement.devices import Device

TIMEOUT_S = 3600.0
# accelerate's FSDP2 as its configuration file would say it.
FSDP2_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def run_step_bench(
    settings: StepSettings,
    devices: Sequence[Device],
    *,
    output: Path | None,
    skip_trl: bool,
    timeout_s: float = TIMEOUT_S,
) -> bool:
    """Measure, print and store.

    Args:
        settings: What is measured.
        devices: The GPUs that this process may use.
        output: Where the results go; None for the usual place.
        skip_trl: Leave TRL out.
        timeout_s: For each trainer.

    Returns:
        Whether Shoal gave figures.
    """
    folder = Path(tempfile.mkdtemp(prefix="shoal-bench-step-"))
    used = tuple(devices[: settings.num_gpus])
    report = StepReport(settings=settings, device_names=[device.name for device in used] or ["CPU"])
    _say(report.headline())
    write_model(settings, folder / "model")
    environment = _environment(settings, used)
    path = output or default_path(settings)
    _run_shoal(report, folder, used, environment, timeout_s)
    store(path, report.to_dict())  # kept if what follows hangs
    reason = "left out (--skip-trl)" if skip_trl else why_not_trl(settings)
    if reason is None:
        _run_trl(report, folder, used, environment, timeout_s)
    else:
        report.reasons["trl"] = reason
        _say(f"no TRL: {reason}")
    data = report.to_dict()
    store(path, data)
    _say(f"stored in {path}")
    if report.shoal is not None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        _say(f"the logs are in {folder}")
    _say(json.dumps(data))
    return report.shoal is not None


def _run_shoal(
    report: StepReport, folder: Path, devices: Sequence[Device], environment: dict[str, str], timeout_s: float
) -> None:
    try:
        report.shoal = _run(report.settings, folder, "shoal", [], devices, environment, timeout_s)
    except StageError as error:
        report.reasons["shoal"] = str(error)
        _say(f"no Shoal: {error}")
        return
    _say(report.lines("Shoal", report.shoal))


def _run_trl(
    report: StepReport, folder: Path, devices: Sequence[Device], environment: dict[str, str], timeout_s: float
) -> None:
    visible = {device.index: device.visible_id for device in devices}
    try:
        with trl_server(report.settings, folder, visible) as url:
            report.trl = _run(report.settings, folder, "trl", [url] if url else [], devices, environment, timeout_s)
    except StageError as error:
        report.reasons["trl"] = str(error)
        _say(f"no TRL: {error}")
        return
    _say(report.lines("TRL", report.trl))


def _run(
    settings: StepSettings,
    folder: Path,
    trainer: str,
    more: Sequence[str],
    devices: Sequence[Device],
    environment: dict[str, str],
    timeout_s: float,
) -> Measured:
    answer = folder / f"{trainer}.json"
    words = [str(answer), str(folder), settings.to_json(), *more]
    command = with_ranks(f"shoal.bench.step_{trainer}", words, settings.num_ranks)
    with MemoryWatch(_probe(devices)) as watch:
        run_to_end(command, folder / f"{trainer}.log", timeout_s=timeout_s, environment=environment)
    try:
        data: dict[str, Any] = json.loads(answer.read_text())
    except (OSError, ValueError) as error:
        raise StageError(f"it left no figures ({error})") from None
    return measured_from(settings, data, device_peak_bytes=watch.extra_bytes)


def _probe(devices: Sequence[Device]) -> Probe:
    """Return a probe of the memory of the fullest GPU, or of all processes below this one."""
    if devices:
        probes = [used_on_gpus([device.visible_id]) for device in devices]
        return lambda: max(probe() for probe in probes)
    own, below = psutil.Process().memory_info().rss, resident([os.getpid()])
    return lambda: max(0, below() - own)


def _environment(settings: StepSettings, devices: Sequence[Device]) -> dict[str, str]:
    """Return the environment of both trainers: the GPUs of the layout, and accelerate's FSDP2 where it is asked for."""
    environment = without_launcher_variables(os.environ) | {"HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": LOOPBACK}
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(device.visible_id for device in devices)
    if settings.sharding == "fsdp2":
        environment |= FSDP2_ENVIRONMENT
    return environment


def _say(text: str) -> None:
    print(text, flush=True)
