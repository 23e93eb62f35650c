"""`shoal bench step`: the same steps in Shoal and in TRL, one after the other on the same devices.

Each trainer has processes of its own, so that what one took is free for the other. What fails leaves its figures empty,
or those of the steps that it did, with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from shoal.bench.children import StageError
from shoal.bench.end_request import EndRequest
from shoal.bench.launch import run_to_end, with_ranks
from shoal.bench.memory import MemoryWatch, Probe, resident, used_on_gpus
from shoal.bench.results import store
from shoal.bench.step_progress import StepProgress
from shoal.bench.step_report import StepReport, Trainer, result_paths, run_of
from shoal.bench.step_run import StepRun
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where both trainers run.

    Attributes:
        folder: Of the model, the logs and what the processes write down.
        devices: The GPUs of the layout.
        environment: Of the processes.
        timeout_s: For each trainer.
        request: Tells when all is to end.
    """

    folder: Path
    devices: Sequence[Device]
    environment: Mapping[str, str]
    timeout_s: float
    request: EndRequest


def run_step_bench(
    run: StepRun, devices: Sequence[Device], *, output: Path | None, skip_trl: bool, timeout_s: float = TIMEOUT_S
) -> bool:
    """Measure, print and store; what a trainer has done is in the results after each of its steps.

    Args:
        run: What is measured.
        devices: The GPUs that this process may use.
        output: Where the results go (`result_paths`); None for the usual place.
        skip_trl: Leave TRL out.
        timeout_s: For each trainer.

    Returns:
        Whether Shoal gave all its figures, and nobody told the benchmark to end.
    """
    folder = Path(tempfile.mkdtemp(prefix="shoal-bench-step-"))
    used = tuple(devices[: run.common.num_gpus])
    names = [device.name for device in used] or ["CPU"]
    reports = [
        StepReport(settings=part, device_names=names, path=path)
        for part, path in zip(run.parts, result_paths(run, output), strict=True)
    ]
    for report in reports:
        _say(report.headline())
    write_model(run.common, folder / "model")
    environment = _environment(run.common, used)
    with EndRequest() as request:
        place = _Place(folder=folder, devices=used, environment=environment, timeout_s=timeout_s, request=request)
        _measure("shoal", reports, place)
        able = [report for report in reports if _can_have_trl(report, request, skip_trl=skip_trl)]
        if able:
            # TRL divides the model among all GPUs that it sees (device_map="auto"), those of its server too.
            of_trl = replace(place, environment=_environment(run.common, used[: run.common.num_ranks]))
            visible = {device.index: device.visible_id for device in used}
            with trl_server(run_of(able), folder, visible) as url:
                _measure("trl", able, of_trl, *([url] if url else []))
    is_done = request.reason is None and not any("shoal" in report.reasons for report in reports)
    if is_done:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        _say(f"the logs are in {folder}")
    _finish(reports)
    return is_done


def _can_have_trl(report: StepReport, request: EndRequest, *, skip_trl: bool) -> bool:
    """Return whether TRL is measured too; say why if not."""
    reason = "left out (--skip-trl)" if skip_trl else request.reason or why_not_trl(report.settings)
    if reason is None:
        return True
    report.take("trl", None, reason)
    _say(report.lines("trl"))
    return False


def _measure(trainer: Trainer, reports: Sequence[StepReport], place: _Place, *words: str) -> None:
    """Run a trainer through the parts of these reports, and store and print its figures."""
    run, answer = run_of(reports), place.folder / f"{trainer}.json"
    words = (str(answer), str(place.folder), run.to_json(), *words)
    command = with_ranks(f"shoal.bench.step_{trainer}", words, run.common.num_ranks)
    failure = None
    with MemoryWatch(_probe(place.devices)) as watch:
        progress = StepProgress(trainer, reports, answer, lambda: watch.extra_bytes)

        def meanwhile() -> None:
            place.request.raise_if_told()
            progress.look()

        try:
            run_to_end(
                command,
                place.folder / f"{trainer}.log",
                timeout_s=place.timeout_s,
                environment=place.environment,
                meanwhile=meanwhile,
            )
        except StageError as error:
            failure = str(error)
    progress.end(failure)
    for report in reports:
        _say(report.lines(trainer))


def _finish(reports: Sequence[StepReport]) -> None:
    """Store and print the results, those of the last part last."""
    found = [report.to_dict() for report in reports]
    for report, data in zip(reports, found, strict=True):
        store(report.path, data)
        _say(f"stored in {report.path}")
    for data in found:
        _say(json.dumps(data))


def _probe(devices: Sequence[Device]) -> Probe:
    """Return a probe of the memory of the fullest GPU, or of all processes below this one."""
    if devices:
        probes = [used_on_gpus([device.visible_id]) for device in devices]
        return lambda: max(probe() for probe in probes)
    own, below = psutil.Process().memory_info().rss, resident([os.getpid()])
    return lambda: max(0, below() - own)


def _environment(settings: StepSettings, devices: Sequence[Device]) -> dict[str, str]:
    """Return a trainer's environment: the GPUs that it sees, and accelerate's FSDP2 where it is asked for."""
    environment = without_launcher_variables(os.environ) | {"HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": LOOPBACK}
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(device.visible_id for device in devices)
    if settings.sharding == "fsdp2":
        environment |= FSDP2_ENVIRONMENT
    return environment


def _say(text: str) -> None:
    print(text, flush=True)
