"""How long a publish over CUDA IPC takes beside its copies: real sender, transport and receiver on a pretended GPU.

    python benchmarks/publish_overhead.py                   # no GPU: copies take time by the clock
    python benchmarks/publish_overhead.py --gb-per-s 398    # as between two GPUs: nothing but the copies should count

Two processes, one trainer rank and one worker, exchange a model with the parameters of Qwen3-8B, each a few kilobytes
in truth. What vLLM, HTTP and digests take is not in it. The last line is one JSON object: milliseconds of the copies
alone, and the median of the publishes after the first three.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import nn

from shoal.bench.pair import run_as_pair
from shoal.bench.shapes import SHAPES, qwen3_config
from shoal.protocols import WeightTransport
from shoal.vllm_plugin.receiver import WeightReceiver, _Intake
from shoal.vllm_plugin.sink import ParameterSink
from shoal.weights.sender import WeightSender
from shoal.weights.sources import make_source
from shoal.wire.device_memory import Copy
from shoal.wire.ipc_transport import IpcTransport
from shoal.wire.liveness import Peers
from shoal.wire.plan import Region, Slice, SlicePlan
from shoal.wire.rendezvous import Store
from shoal.wire.schedule import assign, batches, messages

CPU = torch.device("cpu")
TIMEOUT_S = 60.0
SHAPE = replace(SHAPES["qwen3-8b"], hidden=64, intermediate=192, heads=8, kv_heads=2, head_dim=8, vocabulary=2400)
REAL_BYTES = 16_381_470_720
NUM_BATCHES = 122
NUM_WARM_UPS = 3
OPENING_S, CLOSING_S, QUEUEING_S = 150e-6, 60e-6, 2.5e-6  # of one allocation; of one copy


class At:
    """A moment by the clock."""

    def __init__(self, moment: float) -> None:
        self._moment = moment

    def query(self) -> bool:
        """Whether it is past."""
        return time.perf_counter() >= self._moment


class PretendedMemory:
    """Of a GPU that copies so many bytes a second, one copy after another, and moves nothing.

    Args:
        bytes_per_s: Of its copies.
        scale: Bytes that one byte stands for.
    """

    name = "a pretended GPU"

    def __init__(self, bytes_per_s: float, scale: float) -> None:
        self._seconds_per_byte = scale / bytes_per_s
        self._free_at = 0.0

    def check_reach(self, name: str) -> None:
        """It reaches itself."""

    def export(self, address: int) -> tuple[bytes, int]:
        """Allocations are of 2 MiB."""
        return b"%064x" % (address >> 21), address % (1 << 21)

    def open_handle(self, handle: bytes) -> int:
        """Take as long as the driver does."""
        time.sleep(OPENING_S)
        return int(handle, 16) << 21

    def shut(self, address: int) -> None:
        """Take as long as the driver does."""
        time.sleep(CLOSING_S)

    def allocate(self, num_bytes: int) -> tuple[int, bytes]:
        """Nothing goes through a ring here."""
        raise AssertionError("something could not be lent")

    def release(self, address: int) -> None:
        """Nothing was allocated."""

    def mark(self) -> At:
        """Nothing is under way on the current stream."""
        return At(0.0)

    def copy(self, copies: Sequence[Copy], after: Sequence[object]) -> At:
        """Return when they would be done."""
        queued = time.perf_counter() + QUEUEING_S * len(copies)
        while time.perf_counter() < queued:
            pass
        num_bytes = sum(count for _, _, count in copies)
        self._free_at = max(self._free_at, queued) + num_bytes * self._seconds_per_byte
        return At(self._free_at)


class Line:
    """The line to the worker, as the sender needs it."""

    name = "engine-0"
    preferred = (frozenset[int](),)

    def __init__(self, transport: WeightTransport) -> None:
        self.transport = transport

    def close(self) -> None:
        """Leave it."""
        self.transport.close()

    def member(self, worker: int) -> int:
        """Return the worker's number in the group."""
        return 1 + worker


def main() -> None:
    """Measure, print the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb-per-s", type=float, default=1400.0, help="of the copies (default: within one H200)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seconds = run_as_pair(partial(_member, arguments), port=arguments.port, timeout_s=TIMEOUT_S)
    if seconds is None:
        return
    copies_ms = REAL_BYTES / arguments.gb_per_s / 1e6
    publish_ms = 1e3 * statistics.median(seconds[NUM_WARM_UPS:])
    print(json.dumps({"copies_ms": round(copies_ms, 2), "publish_ms": round(publish_ms, 2), "cores": os.cpu_count()}))


def _member(arguments: argparse.Namespace, store: Store, rank: int) -> list[float]:
    """Be one end of every publish, and return how long each took here."""
    model = _model()
    num_bytes = sum(value.nbytes for value in model.parameters())
    source = make_source(model)
    plan = _plan(source.metadata())
    transport = IpcTransport(
        store,
        rank=rank,
        peers=Peers(store, rank=rank, others=[1 - rank], timeout_s=TIMEOUT_S),
        peer_ranks=[1 - rank],
        memory=PretendedMemory(arguments.gb_per_s * 1e9, REAL_BYTES / num_bytes),
        staging_bytes=1 << 20,
        timeout_s=TIMEOUT_S,
    )
    batch_bytes = num_bytes // NUM_BATCHES
    if rank == 0:
        sender = WeightSender(
            source,
            rank=0,
            holdings=[source.held()],
            lines=[Line(transport)],
            plans=[[plan]],
            device=CPU,
            batch_bytes=batch_bytes,
        )
    else:
        sink = ParameterSink(model, plan, CPU)
        owners = assign(source.metadata(), [source.held()])
        arriving = [
            tuple(message for part in parts for message in messages(plan, owners, part))
            for parts in batches(source.metadata(), batch_bytes)
        ]
        intake = _Intake(source.metadata(), plan, sink, arriving, {})
    seconds = []
    for repeat in range(NUM_WARM_UPS + arguments.repeats):
        store.set(f"{repeat}/{rank}", "")
        store.wait([f"{repeat}/{1 - rank}"], timedelta(seconds=TIMEOUT_S))
        began = time.perf_counter()
        if rank == 0:
            assert not sender.send([0], timeout_s=TIMEOUT_S, verify="off").lost
        else:
            sink.begin(with_digests=False)
            WeightReceiver._take_all(transport, intake, "off")
            transport.finish(TIMEOUT_S)
        seconds.append(time.perf_counter() - began)
    transport.close()
    return seconds


def _model() -> nn.Module:
    """Return a model with as many parameters as Qwen3-8B, in about its proportions."""
    from transformers import Qwen3ForCausalLM

    model: nn.Module = Qwen3ForCausalLM(qwen3_config(SHAPE))
    return model.to(torch.bfloat16)


def _plan(parameters: Sequence[Any]) -> SlicePlan:
    """Return the plan of a worker that holds everything as the checkpoint has it."""
    regions = [(meta.name, Region.of(torch.empty(meta.shape, device="meta"))) for meta in parameters]
    slices = tuple(
        Slice(target=name, source=name, source_region=region, target_region=region, dtype="bfloat16")
        for name, region in regions
    )
    return SlicePlan(worker="engine-0 worker 0", slices=slices, fills=(), reloaded=())


if __name__ == "__main__":
    main()
