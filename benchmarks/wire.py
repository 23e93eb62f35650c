"""Time a full set of weights from one trainer rank to one worker through a transport, beside what torch does raw.

    python benchmarks/wire.py --backend nccl --gib 16 --tensors 399      # 2 GPUs
    python benchmarks/wire.py --backend ipc --gib 16 --tensors 399       # 1 GPU, or 2 with --worker-gpu 1
    python benchmarks/wire.py --backend gloo --gib 0.25 --tensors 399    # no GPU

Then with both ends digesting what travels, as a publish does: once all is there (`digests_end`), or each batch while
later ones are on their way (`digests_overlapped`), beside none at all (`digests_none`). These end when both ends have
met.

The last line is one JSON object. Rates are in GB/s (10^9 bytes), the median over the repeats; a repeat is timed on
the sender from the first call to the end of `finish`, which for all but Gloo means that the receiver has everything.
`batch_isend_irecv` and `broadcast` need a torch process group, hence are missing beside `ipc` on one GPU, where NCCL
refuses two processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from shoal.bench.pair import run_as_pair
from shoal.protocols import Parcel, Pending, WeightTransport
from shoal.wire.digest import DigestPlan, Run, unsigned
from shoal.wire.rendezvous import Store
from shoal.wire.schedule import num_ahead
from shoal.wire.side_stream import SideStream
from shoal.wire.transport import DEFAULT_STAGING_BYTES, make_transport

HOST = "127.0.0.1"
TIMEOUT_S = 120.0


def main() -> None:
    """Measure, print the result."""
    arguments = _arguments()
    rates = run_as_pair(partial(_member, arguments), port=arguments.port, timeout_s=TIMEOUT_S)
    if rates is None:
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    machine = {"gpus": gpus, "python": platform.python_version(), "torch": torch.__version__, "nccl": nccl}
    settings = {name: getattr(arguments, name) for name in ("backend", "gib", "tensors", "batch_mib", "staging_mib")}
    print(json.dumps({**settings, "worker_gpu": arguments.worker_gpu, **rates, **machine}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=("gloo", "nccl", "ipc"), required=True)
    parser.add_argument("--gib", type=float, default=16.0, help="bytes in all")
    parser.add_argument("--tensors", type=int, default=399)
    parser.add_argument("--batch-mib", type=float, default=1024.0, help="bytes under way at once")
    parser.add_argument("--staging-mib", type=int, default=DEFAULT_STAGING_BYTES >> 20, help="ipc only")
    parser.add_argument("--worker-gpu", type=int, default=None, help="default: 1 for nccl, 0 for ipc")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker_gpu is None:
        arguments.worker_gpu = 1 if arguments.backend == "nccl" else 0
    return arguments


def _member(arguments: argparse.Namespace, store: Store, rank: int) -> dict[str, float]:
    """Be one end of every method, and return the rates in GB/s that this end saw."""
    on_gpu = arguments.backend != "gloo"
    device = torch.device("cuda", arguments.worker_gpu * rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    tensors = _tensors(arguments, device, rank)
    began = time.perf_counter()
    transport = make_transport(
        store,
        backend=arguments.backend,
        rank=rank,
        num_trainers=1,
        num_workers=1,
        host=HOST,
        device=device,
        timeout_s=TIMEOUT_S,
        staging_bytes=arguments.staging_mib << 20,
    )
    results = {"connect_s": time.perf_counter() - began}
    batches = _batches(tensors, arguments.batch_mib * 2**20)

    def through_transport() -> None:
        operation = transport.send if rank == 0 else transport.receive
        under_way = [operation([Parcel(tensor, 1 - rank, stays=True) for tensor in batch]) for batch in batches]
        for pending in under_way:
            pending.wait()
        transport.finish(TIMEOUT_S)

    def meet(name: str) -> None:
        store.set(f"{name}/{rank}", "")
        store.wait([f"{name}/{1 - rank}"], timedelta(seconds=TIMEOUT_S))

    num_bytes = sum(tensor.nbytes for tensor in tensors)

    def rate(name: str, transfer: Callable[[], object]) -> None:
        seconds = []
        for repeat in range(arguments.repeats + 1):
            meet(f"{name}/{repeat}")
            start = time.perf_counter()
            transfer()
            seconds.append(time.perf_counter() - start)
        results[f"{name}_first_gb_s"] = num_bytes / seconds[0] / 1e9
        results[f"{name}_gb_s"] = num_bytes / statistics.median(seconds[1:]) / 1e9

    rate("transport", through_transport)
    if rank == 1:
        assert all(bool((tensor == index % 251).all()) for index, tensor in enumerate(tensors)), "wrong values arrived"
    meet("checked")
    _rate_digests(transport, rank, batches, rate, meet)
    if arguments.backend != "ipc" or arguments.worker_gpu != 0:
        _rate_torch(arguments, store, rank, batches, rate)
    meet("over")
    transport.close()
    return {name: round(value, 3) for name, value in results.items()}


def _rate_digests(
    transport: WeightTransport,
    rank: int,
    batches: list[list[torch.Tensor]],
    rate: Callable[[str, Callable[[], object]], None],
    meet: Callable[[str], None],
) -> None:
    """Time the transport again with a digest of each tensor at both ends."""
    device = batches[0][0].device
    slots = itertools.count()
    runs = [[Run(tensor, 0, next(slots)) for tensor in batch] for batch in batches]
    whole = list(itertools.chain.from_iterable(runs))
    plan, plans = DigestPlan(whole, len(whole), device), [DigestPlan(batch, len(whole), device) for batch in runs]
    operation = transport.send if rank == 0 else transport.receive
    met = itertools.count()

    def transfer(digests: str) -> list[int]:
        total = torch.zeros(len(whole), dtype=torch.int64, device=device)
        beside = SideStream(device)

        def settle(of_batch: DigestPlan, pending: Pending) -> None:
            pending.wait()
            if digests == "overlapped":
                with beside.after_current():
                    of_batch.add_to(total)

        under_way: deque[tuple[DigestPlan, Pending]] = deque()
        for batch, of_batch in zip(batches, plans, strict=True):
            pending = operation([Parcel(tensor, 1 - rank, stays=True) for tensor in batch])
            under_way.append((of_batch, pending))
            while len(under_way) > num_ahead(is_kept=True, goes_back=False):
                settle(*under_way.popleft())
        while under_way:
            settle(*under_way.popleft())
        transport.finish(TIMEOUT_S)
        if digests == "end":
            plan.add_to(total)
        beside.join()
        found = unsigned(total)
        meet(f"digests/{next(met)}")
        return found

    for digests in ("none", "end", "overlapped"):
        rate(f"digests_{digests}", lambda digests=digests: transfer(digests))  # type: ignore[misc]
    assert transfer("end") == transfer("overlapped") != transfer("none"), "the digests differ"


def _rate_torch(
    arguments: argparse.Namespace,
    store: Store,
    rank: int,
    batches: list[list[torch.Tensor]],
    rate: Callable[[str, Callable[[], object]], None],
) -> None:
    """Time torch's own ways on a default process group."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch_store = dist.PrefixStore("torch", store)  # type: ignore[attr-defined,arg-type]
    dist.init_process_group(
        "gloo" if arguments.backend == "gloo" else "nccl", store=torch_store, rank=rank, world_size=2
    )

    def synchronize() -> None:
        if arguments.backend != "gloo":
            torch.cuda.synchronize()

    def pairs() -> None:
        operation = dist.isend if rank == 0 else dist.irecv
        for batch in batches:
            works = dist.batch_isend_irecv([dist.P2POp(operation, tensor, 1 - rank) for tensor in batch])
            for work in works:
                work.wait()
        synchronize()

    def broadcast() -> None:
        for batch in batches:
            for tensor in batch:
                dist.broadcast(tensor, 0)
        synchronize()

    rate("batch_isend_irecv", pairs)
    rate("broadcast", broadcast)
    dist.destroy_process_group()


def _tensors(arguments: argparse.Namespace, device: torch.device, rank: int) -> list[torch.Tensor]:
    """Make tensors of the sizes of a language model's: a few large ones, most middling, some tiny."""
    shares = [(16, 4, 4, 1, 0.001)[index % 5] for index in range(arguments.tensors)]
    scale = arguments.gib * 2**30 / 2 / sum(shares)
    return [
        torch.full((max(1, int(share * scale)),), index % 251 if rank == 0 else -1, dtype=torch.bfloat16, device=device)
        for index, share in enumerate(shares)
    ]


def _batches(tensors: list[torch.Tensor], limit: float) -> list[list[torch.Tensor]]:
    batches: list[list[torch.Tensor]] = []
    size = limit
    for tensor in tensors:
        if size + tensor.nbytes > limit:
            batches.append([])
            size = 0.0
        batches[-1].append(tensor)
        size += tensor.nbytes
    return batches


if __name__ == "__main__":
    main()
