"""The parts of the weights benchmark that need no engine."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch

from shoal.bench.children import StageError, run_children
from shoal.bench.load import RunningLoad
from shoal.bench.memory import MemoryWatch, outside_torch, parse_used_bytes
from shoal.bench.model import build_model, change_weights, make_sources, parameters_of
from shoal.bench.native import why_not
from shoal.bench.raw import _Member, measure_raw
from shoal.bench.results import Results
from shoal.bench.settings import BenchSettings, check_source, engine_specs, settle_devices
from shoal.engines.client import EngineClient
from shoal.errors import ConfigError, EngineRequestError
from shoal.placement.devices import hypothetical_gpus
from shoal.protocols import Parcel
from shoal.testing.transport import FlippingTransport

CPU = BenchSettings(model_shape="tiny", device="cpu", repeats=2)
CUDA = BenchSettings(model_shape="tiny", device="cuda")


@pytest.mark.parametrize(
    ("changes", "colocate", "devices", "backend"),
    [
        ({}, False, (1,), "nccl"),
        ({"tensor_parallel_size": 2, "num_engines": 2, "num_ranks": 2}, False, (2, 3, 4, 5), "nccl"),
        ({"engine_devices": (3,)}, False, (3,), "nccl"),
        ({"tensor_parallel_size": 2}, True, (0, 1), "ipc"),
        ({"backend_on_gpus": "ipc"}, False, (1,), "ipc"),
    ],
)
def test_engines_take_the_gpus_after_the_trainers_unless_told_otherwise(
    changes: dict[str, Any], colocate: bool, devices: tuple[int, ...], backend: str
) -> None:
    settled = settle_devices(replace(CUDA, **changes), hypothetical_gpus(range(6)), colocate=colocate)
    assert (settled.engine_devices, settled.backend) == (devices, backend)
    assert BenchSettings.from_json(settled.to_json()) == settled


@pytest.mark.parametrize(
    ("changes", "colocate", "says"),
    [
        ({"num_engines": 2}, False, "GPU 2 is not here: this process sees 2"),
        ({"engine_devices": (1,), "tensor_parallel_size": 2}, False, "are not 2 GPUs"),
        ({"engine_devices": (0,)}, False, "shares a GPU with the trainer. Add --colocate"),
        ({"engine_devices": (1,)}, True, "shares no GPU with the trainer. Leave out --colocate"),
        ({"backend_on_gpus": "nccl"}, True, "NCCL refuses two processes on one GPU"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_what_to_do(
    changes: dict[str, Any], colocate: bool, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        settle_devices(replace(CUDA, **changes), hypothetical_gpus(range(2)), colocate=colocate)


def test_each_engine_gets_its_own_gpus_and_the_adapter_only_where_it_serves_one(tmp_path: Any) -> None:
    settings = replace(CUDA, engine_devices=(1, 2, 3, 4), tensor_parallel_size=2, num_engines=2, source="adapter")
    specs = engine_specs(settings, tmp_path, hypothetical_gpus(range(5)))
    assert [spec.cuda_devices for spec in specs] == [("1", "2"), ("3", "4")]
    assert [spec.lora_adapter for spec in specs] == [tmp_path / "adapter"] * 2
    (plain,) = engine_specs(replace(CUDA, engine_devices=(1,)), tmp_path, hypothetical_gpus(range(2)))
    assert plain.lora_adapter is None


def test_an_engine_that_opens_the_trainers_memory_sees_their_gpus_after_its_own(tmp_path: Any) -> None:
    apart = replace(CUDA, num_ranks=2, num_engines=2, engine_devices=(2, 3), backend_on_gpus="ipc")
    shared = replace(CUDA, num_ranks=2, num_engines=2, engine_devices=(0, 1))
    by_nccl = replace(apart, backend_on_gpus="nccl")
    for settings, opened in ((apart, [("0", "1")] * 2), (shared, [("1",), ("0",)]), (by_nccl, [(), ()])):
        specs = engine_specs(settings, tmp_path, hypothetical_gpus(range(4)))
        assert [spec.opened_devices for spec in specs] == opened


def test_sources_for_several_processes_are_refused_in_one_and_the_other_way_round() -> None:
    for source, ranks in (("fsdp2", 1), ("ddp", 1), ("plain", 2), ("adapter", 2)):
        with pytest.raises(ConfigError, match=f"--source {source} does not go with {ranks}"):
            check_source(replace(CPU, source=cast(Any, source), num_ranks=ranks))


def test_native_is_left_out_with_its_reason_where_it_cannot_run() -> None:
    assert why_not(CPU) == "vLLM's NCCL update needs GPUs"
    assert "needs a GPU for the trainer" in str(why_not(replace(CUDA, engine_devices=(0,))))
    assert why_not(replace(CUDA, engine_devices=(1,))) is None


@pytest.mark.parametrize("source", ["plain", "lora-merged", "adapter"])
def test_every_change_changes_every_tensor_that_is_sent_and_two_leave_it_as_it_was(source: Any) -> None:
    settings = replace(CPU, source=source, lora_rank=2)
    model = build_model(settings, torch.device("cpu"))
    sources = make_sources(model, settings)
    sent = sources["adapter" if source == "adapter" else "model"]
    assert [meta.name for meta in parameters_of(settings)] == [meta.name for meta in sent.metadata()]

    def values() -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in sent.tensors()}

    first = values()
    change_weights(model, settings)
    second = values()
    change_weights(model, settings)
    third = values()
    factor = ".lora_A."
    assert all(not torch.equal(first[name], second[name]) for name in first if factor not in name)
    assert all(torch.equal(first[name], third[name]) for name in first)


def test_a_flipped_bit_is_one_bit_of_one_parcel() -> None:
    sent: list[torch.Tensor] = []

    class Inner:
        def send(self, parcels: Sequence[Parcel]) -> None:
            sent.extend(parcel.tensor for parcel in parcels)

    transport = FlippingTransport(cast(Any, Inner()))
    tensors = [torch.zeros(0), torch.ones(3, dtype=torch.bfloat16), torch.ones(3)]
    transport.send([Parcel(tensor, 1) for tensor in tensors])
    transport.flip_first()
    for _ in range(2):
        transport.send([Parcel(tensor, 1) for tensor in tensors])
    differing = [not torch.equal(one, other) for one, other in zip(sent, tensors * 3, strict=True)]
    assert differing == [False, False, False, False, True, False, False, False, False]
    assert (sent[4].view(torch.int16) ^ tensors[1].view(torch.int16)).tolist() == [1, 0, 0]
    assert transport.num_flips == 1


def test_raw_pieces_give_each_worker_its_share_from_every_rank_once() -> None:
    settings = replace(CPU, num_ranks=2, tensor_parallel_size=2, num_engines=2)
    member = object.__new__(_Member)
    member.settings = settings
    arrived: dict[int, list[int]] = {}
    for member.rank in range(2):
        for peer, piece in member._pieces(torch.arange(8)):
            arrived.setdefault(peer, []).extend(piece.tolist())
    for member.rank in range(2, 6):
        wanted = [value for _, piece in member._pieces(torch.arange(8)) for value in piece.tolist()]
        assert wanted == arrived[member.rank]
    assert sorted(arrived[2] + arrived[3]) == sorted(arrived[4] + arrived[5]) == list(range(8))


def test_the_wire_alone_is_timed_between_processes() -> None:
    samples = measure_raw(CPU, timeout_s=120)
    assert sorted(samples) == ["broadcast", "p2p"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in samples.values())


def test_a_child_that_fails_or_hangs_is_told_and_not_waited_for() -> None:
    with pytest.raises(StageError, match=r"status 1: .*Error"):
        run_children("shoal.bench.raw", [("{", "0", "1")], timeout_s=60)
    began = time.monotonic()
    with pytest.raises(StageError, match=r"it took more than 0\.5 s"):
        run_children("shoal.bench.raw", [(CPU.to_json(), "0", "1")], timeout_s=0.5)
    assert time.monotonic() - began < 100


def test_what_a_stage_has_started_ends_with_it_also_when_the_stage_does_not_see_to_it(tmp_path: Path) -> None:
    (tmp_path / "leaves_one.py").write_text(
        "import json, os, subprocess, sys\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(sys.argv[1], 'w').write(json.dumps(left.pid))\n"
        "sys.stdout.flush(); os._exit(0)\n"
    )
    left = run_children("leaves_one", [()], timeout_s=60, environment=os.environ | {"PYTHONPATH": str(tmp_path)})
    with suppress(psutil.NoSuchProcess):
        psutil.Process(left).wait(timeout=60)


def test_memory_that_is_given_back_between_two_readings_is_not_taken_for_somebody_elses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe = outside_torch(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20, 100))
    for readings, outside in (([70, 70], 10), ([70, 0], 10), ([0, 70], 10), ([0, 0], 80)):
        reserved = iter(readings)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, reserved=reserved: next(reserved))
        assert probe() == outside


def test_memory_is_the_peak_beyond_the_start() -> None:
    values = iter([100, 130, 170, 150])
    last = 150

    def probe() -> int:
        return next(values, last)

    with MemoryWatch(probe) as watch:
        time.sleep(0.1)
    assert watch.extra_bytes == 70


def test_used_memory_is_read_for_the_gpus_asked_for_alone() -> None:
    output = "0, GPU-aa11, 1000\n1, GPU-bb22, 20\n2, GPU-cc33, 3\n"
    assert parse_used_bytes(output, ["1"]) == 20 << 20
    assert parse_used_bytes(output, ["GPU-aa", "2"]) == 1003 << 20


def test_a_missing_figure_keeps_the_one_that_was_found() -> None:
    results = Results(CPU, ["CPU"])
    assert results.median("wire_ms", [0.003, 0.001, 0.002]) == 2.0
    results.missing(["wire_ms", "total_ms"], "it broke")
    data = results.to_dict()
    assert (data["wire_ms"], data["total_ms"]) == (2.0, None)
    assert data["reasons"] == {"total_ms": "it broke"}
    assert data["samples"]["wire_ms"] == [3.0, 1.0, 2.0]


class FakeClient:
    """Counts what runs at the moment."""

    def __init__(self) -> None:
        self.running = 0
        self.seeds: list[int] = []
        self.posts: list[tuple[str, Any]] = []

    async def generate(self, request: Any) -> None:
        self.seeds.append(request.seed)
        self.running += 1
        try:
            await asyncio.sleep(0.01)
            if request.seed % 5 == 0:
                raise EngineRequestError("now and then")
        finally:
            self.running -= 1

    def num_running(self, timeout_s: float) -> int:
        return self.running

    def post(self, path: str, body: Any, timeout_s: float) -> None:
        self.posts.append((path, body))

    async def aclose(self) -> None:
        self.posts.append(("closed", None))


def test_load_is_kept_up_over_all_engines_and_ends() -> None:
    clients = [FakeClient(), FakeClient()]
    with RunningLoad(cast("list[EngineClient]", clients), 6, max_tokens=32, vocabulary=300) as load:
        assert load.wait_until_running(10) == 6
        time.sleep(0.3)
        assert load.wait_until_running(10) == 6
    assert [client.running for client in clients] == [0, 0]
    seeds = clients[0].seeds + clients[1].seeds
    assert len(seeds) > 12 and len(set(seeds)) == len(seeds)
    with RunningLoad(cast("list[EngineClient]", clients), 6, max_tokens=32, vocabulary=300) as load:
        load._num_requests = 7
        with pytest.raises(StageError, match=r"write \d completions, not 7"):
            load.wait_until_running(0.2)
