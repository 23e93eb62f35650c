"""`shoal bench weights`: the wire alone, vLLM's own update, and Shoal's publishes, one after another in one run.

Every stage stands alone: what fails leaves its figures empty, with the reason, and the next one begins.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from shoal.bench.model import build_model, parameters_of, write_engine_folder
from shoal.bench.native import measure_native, why_not
from shoal.bench.publishes import PublishBench
from shoal.bench.raw import measure_raw
from shoal.bench.results import Results, default_path, header, milliseconds, row, times
from shoal.bench.settings import BenchSettings, engine_specs
from shoal.engines.fleet import Fleet
from shoal.placement.devices import Device
from shoal.trainer.exchange import Exchange
from shoal.weights.sources import write_adapter

RAW_TIMEOUT_S = 600.0
NATIVE_TIMEOUT_S = 1500.0
START_TIMEOUT_S = 900.0
REQUEST_TIMEOUT_S = 600.0
_OURS = (
    "proven", "control_caught", "wire_ms", "total_ms", "total_running_ms", "proof_ms", "extra_bytes_trainer",
    "extra_bytes_engine", "gb_per_s", "num_running",
)  # fmt: skip
_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is done with it.

    Attributes:
        output: Where the results go; None for the usual place.
        skip_raw: Leave out the wire alone.
        skip_native: Leave out vLLM's own update.
    """

    output: Path | None
    skip_raw: bool
    skip_native: bool


def run_weights_bench(settings: BenchSettings, options: Options, devices: Sequence[Device]) -> bool:
    """Measure, print and store. With torchrun, every rank calls this and rank 0 prints.

    Args:
        settings: What is measured, its devices settled.
        options: What is done with it.
        devices: The GPUs that this process may use.

    Returns:
        Whether every publish was proven and the flipped bit was found, which rank 0 judges: the others' is always True.
    """
    rank = int(os.environ.get("RANK", "0"))
    used = sorted({*range(settings.num_ranks), *settings.engine_devices}) if settings.device == "cuda" else []
    names = [device.name for device in devices if device.index in used] or ["CPU"]
    results = Results(settings, names, (options.output or default_path(settings)) if rank == 0 else None)
    folder = Path()
    say: Callable[[str], None] = _say if rank == 0 else _say_nothing
    if rank == 0:
        folder = Path(tempfile.mkdtemp(prefix="shoal-bench-"))
        _begin(results, folder, say)
        # Before this process takes any of the devices' memory; other ranks wait where the group is formed.
        _raw(results, options, say)
        _native(results, options, folder, say)
    with _ranks(settings) as (ranks, device):
        _ours(results, folder, devices, ranks, device, say)
    is_fine = bool(results.values["proven"] and results.values["control_caught"])
    if rank == 0:
        for name, reason in results.reasons.items():
            say(f"no {name}: {reason}")
        results.store()
        say(f"stored in {results.path}")
        if is_fine:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            say(f"the engines' logs are in {folder}")
        say(json.dumps(results.to_dict()))
    return is_fine or rank > 0


def _begin(results: Results, folder: Path, say: Callable[[str], None]) -> None:
    settings = results.settings
    write_engine_folder(settings, folder / "model")
    parameters = parameters_of(settings)
    size = torch.empty(0, dtype=getattr(torch, settings.dtype)).element_size()
    once = sum(meta.num_elements for meta in parameters) * size
    # Until a publish has counted: every engine gets everything once.
    results.values["num_bytes"] = once * settings.num_engines
    results.values["num_tensors"] = len(parameters)
    say(
        f"{settings.model_shape}: {len(parameters)} tensors, {once / _GB:.3f} GB in {settings.dtype}; "
        f"{settings.layout} over {settings.backend}; medians of {settings.repeats}"
    )
    say(header())


def _raw(results: Results, options: Options, say: Callable[[str], None]) -> None:
    names = ("raw_p2p_ms", "raw_broadcast_ms", "raw_copy_ms")
    if options.skip_raw:
        results.missing(names, "left out (--skip-raw)")
        return
    with _stage(results, names):
        samples = measure_raw(results.settings, RAW_TIMEOUT_S)
        for kind, title in (
            ("p2p", "raw send/recv, in place"),
            ("broadcast", "raw broadcast"),
            ("copy", "copies within the device"),
        ):
            if kind in samples:
                value = results.median(f"raw_{kind}_ms", samples[kind])
                say(row(title, milliseconds(value), f"{results.rate(value):,.1f} GB/s"))
        shared = results.settings.is_colocated
        results.missing(names, "trainer and engine share a GPU" if shared else "trainer and engine share no GPU")


def _native(results: Results, options: Options, folder: Path, say: Callable[[str], None]) -> None:
    names = ("vllm_native_ms", "vllm_native_total_ms")
    if reason := "left out (--skip-native)" if options.skip_native else why_not(results.settings):
        results.missing(names, reason)
        return
    with _stage(results, names):
        samples = measure_native(results.settings, folder, NATIVE_TIMEOUT_S)
        value = results.median("vllm_native_ms", samples["update"])
        raw = results.values["raw_p2p_ms"]
        say(row("vLLM's own update, start to finish", milliseconds(value), times(value, raw, "raw send/recv")))
        total = results.median("vllm_native_total_ms", samples["total"])
        say(row("vLLM's own update, pause to resume", milliseconds(total), times(total, raw, "raw send/recv")))


def _ours(
    results: Results,
    folder: Path,
    devices: Sequence[Device],
    ranks: Exchange,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Start the engines and publish to them."""
    settings = results.settings
    fleet: Fleet | None = None
    with _stage(results, _OURS):

        def start() -> None:
            nonlocal fleet
            fleet = Fleet.start(
                engine_specs(settings, folder, devices),
                log_dir=folder / "engines",
                timeout_s=START_TIMEOUT_S,
                request_timeout_s=REQUEST_TIMEOUT_S,
            )

        try:
            model = build_model(settings, device)
            if settings.source == "adapter":
                write_adapter(model, folder / "adapter")
            ranks.json(start)
            bench = PublishBench(settings, model, fleet, ranks=ranks, device=device)
            _memory(results, bench, say)
            _idle(results, bench, say)
            _running(results, bench, say)
            _proof(results, bench, say)
            with _stage(results, ["control_caught"]):
                results.values["control_caught"] = caught = bench.control()
                say(row("one bit flipped on the wire", "found" if caught else "NOT FOUND"))
        finally:
            if fleet is not None:
                fleet.close()


def _idle(results: Results, bench: PublishBench, say: Callable[[str], None]) -> None:
    names = ("proven", "wire_ms", "total_ms", "gb_per_s")
    values = results.values
    with _stage(results, names):
        done = bench.idle()
        results.publishes("idle", done.reports)
        values["num_bytes"] = done.reports[-1].num_bytes
        wire = results.median("wire_ms", [report.phases["wire"] for report in done.reports])
        values["gb_per_s"] = round(results.rate(wire), 3)
        limit = values["raw_p2p_ms"] or values["raw_copy_ms"]
        say(row("Shoal, wire", milliseconds(wire), f"{times(wire, limit, 'raw')}  {results.rate(wire):,.1f} GB/s"))
        total = results.median("total_ms", [report.seconds for report in done.reports])
        native = values["vllm_native_total_ms"]
        say(row("Shoal, whole publish, idle engines", milliseconds(total), times(total, native, "vLLM's own")))
        values["proven"] = all(report.num_digests > 0 for report in done.reports)


def _memory(results: Results, bench: PublishBench, say: Callable[[str], None]) -> None:
    with _stage(results, ["extra_bytes_trainer", "extra_bytes_engine"]):
        extra = bench.memory()
        results.values["extra_bytes_trainer"] = extra.trainer
        results.values["extra_bytes_engine"] = extra.engine
        for title, taken in (("trainer", extra.trainer), ("engine", extra.engine)):
            share = taken / float(results.values["num_bytes"] or 1)
            say(row(f"memory that it takes, {title}", f"{taken / 2**20:,.0f} MiB", f"{share:.2f} x what is sent"))


def _running(results: Results, bench: PublishBench, say: Callable[[str], None]) -> None:
    with _stage(results, ["total_running_ms", "num_running"]):
        done = bench.running()
        results.publishes("running", done.reports)
        results.samples["num_running"] = list(done.running)
        results.values["num_running"] = fewest = min(done.running)
        total = results.median("total_running_ms", [report.seconds for report in done.reports])
        idle = results.values["total_ms"]
        say(row(f"Shoal, whole publish, {fewest} running", milliseconds(total), times(total, idle, "idle")))


def _proof(results: Results, bench: PublishBench, say: Callable[[str], None]) -> None:
    with _stage(results, ["proof_ms"]):
        proven, unproven = bench.with_and_without_proof()
        total = results.keep("proven_in_turn_ms", [report.seconds for report in proven.reports])
        without = results.keep("unproven_in_turn_ms", [report.seconds for report in unproven.reports])
        results.values["proof_ms"] = proof = round(total - without, 4)
        say(row("of it, the proof", milliseconds(proof), f"{proof / total:.1%} of the publish"))


@contextmanager
def _stage(results: Results, names: Sequence[str]) -> Iterator[None]:
    """Go on after a failure, with its reason in place of the figures. What was found is kept if a later stage hangs."""
    try:
        yield
    except Exception as error:
        results.missing(names, f"{type(error).__name__}: {' '.join(str(error).split())}")
    results.store()


@contextmanager
def _ranks(settings: BenchSettings) -> Iterator[tuple[Exchange, torch.device]]:
    """Join the other trainer ranks, where there are any."""
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu") if settings.device == "cpu" else torch.device("cuda", local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience_s = RAW_TIMEOUT_S + NATIVE_TIMEOUT_S + START_TIMEOUT_S
    if settings.num_ranks > 1:
        backend = "gloo" if device.type == "cpu" else "nccl"
        dist.init_process_group(backend, timeout=timedelta(seconds=patience_s))
    try:
        yield Exchange(rank=rank, world_size=settings.num_ranks, timeout_s=patience_s), device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _say(text: str) -> None:
    print(text, flush=True)


def _say_nothing(text: str) -> None:
    """Rank 0 speaks."""
